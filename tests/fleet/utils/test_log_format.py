"""Log lines for the journal, and for files and terminals."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fleet.utils.log_format import log_formatter

LOG = "import logging; from fleet.utils.log_format import set_up_log; set_up_log(); "
WARN = LOG + "logging.getLogger('fleet.x').warning('first\\nsecond')"


def test_a_line_in_a_file_has_time_and_level(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        subprocess.run([sys.executable, "-c", WARN], stderr=file, check=True)
    line = (tmp_path / "log").read_text()
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARNING fleet\.x: first\n", line)


def test_each_line_in_the_journal_has_its_priority(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        status = os.fstat(file.fileno())
        variables = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        subprocess.run(
            [sys.executable, "-c", WARN], stderr=file, env=os.environ | variables, check=True
        )
    assert (tmp_path / "log").read_text() == "<4>fleet.x: first\n<4>second\n"


def test_a_variable_of_another_process_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")  # as in a terminal that a service has started
    record = logging.LogRecord("x", logging.ERROR, "", 0, "text", None, None)
    with (tmp_path / "log").open("w") as file:
        assert " ERROR x: text" in log_formatter(file).format(record)
