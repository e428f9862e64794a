"""Log lines for the journal, and for files and terminals."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fleet.utils.log_format import RepeatedErrors, log_formatter

LOG = "import logging; from fleet.utils.log_format import set_up_log; set_up_log(); "
WARN = LOG + "logging.getLogger('fleet.x').warning('first\\nsecond')"


def test_a_line_in_a_file_has_time_and_level(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        subprocess.run([sys.executable, "-c", WARN], stderr=file, check=True)
    line = (tmp_path / "log").read_text()
    assert re.match(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARNING fleet\.x: first\\nsecond\n", line
    )


def test_a_line_in_the_journal_has_its_priority_and_stays_one_line(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        status = os.fstat(file.fileno())
        variables = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        subprocess.run(
            [sys.executable, "-c", WARN], stderr=file, env=os.environ | variables, check=True
        )
    assert (tmp_path / "log").read_text() == "<4>fleet.x: first\\nsecond\n"


def test_a_variable_of_another_process_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")  # as in a terminal that a service has started
    record = logging.LogRecord("x", logging.ERROR, "", 0, "text", None, None)
    with (tmp_path / "log").open("w") as file:
        assert " ERROR x: text" in log_formatter(file).format(record)


def error_record(number: int) -> logging.LogRecord:
    try:
        raise AttributeError(f"round {number}")
    except AttributeError:
        info = sys.exc_info()
    return logging.LogRecord("x", logging.ERROR, "", 0, "%s failed", ("a task",), info)


def test_an_error_of_each_round_has_its_traceback_once_and_then_a_line() -> None:
    repeated = RepeatedErrors(interval_s=0.0)
    texts = []
    for number in range(3):
        record = error_record(number)
        assert repeated.filter(record)
        texts.append(logging.Formatter().format(record))
    assert texts[0].startswith("a task failed\nTraceback")
    assert texts[1:] == [f"a task failed: AttributeError: round {number}" for number in (1, 2)]


def test_a_repeated_error_is_silent_until_the_interval_has_passed_and_another_is_not() -> None:
    repeated = RepeatedErrors(interval_s=1000.0)
    assert [repeated.filter(error_record(number)) for number in range(3)] == [True, False, False]
    try:
        raise TypeError("elsewhere")
    except TypeError:
        other = logging.LogRecord("x", logging.ERROR, "", 0, "text", None, sys.exc_info())
    assert repeated.filter(other)
    assert other.exc_info
