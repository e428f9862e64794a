"""Processes stay on their cores, and their cost can be read from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import processes
from benchmarks.processes import cpu_s, energy_j, started_on, two_cores


def test_what_is_started_on_a_core_stays_there_and_we_do_not() -> None:
    before = os.sched_getaffinity(0)
    core = max(before)
    with started_on(core):
        code = "import os; print(os.sched_getaffinity(0))"
        said = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
        )
    assert said.stdout.strip() == str({core})
    assert os.sched_getaffinity(0) == before


def test_without_a_second_core_nothing_is_held_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert two_cores() is None
    with started_on(None):
        pass
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 3, 4})
    assert two_cores() == (3, 4)


def test_the_cpu_time_of_a_process_is_all_its_threads() -> None:
    lower = time.process_time()
    seen = cpu_s(os.getpid())
    upper = time.process_time()
    assert lower <= seen <= upper


def test_a_process_that_has_gone_has_no_cpu_time() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(60)
    with pytest.raises(OSError, match="Invalid argument"):
        cpu_s(process.pid)


def test_energy_is_that_of_all_processors_where_it_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "POWERCAP", tmp_path / "none")
    assert energy_j() is None
    monkeypatch.setattr(processes, "POWERCAP", tmp_path)
    for zone, energy in (
        ("intel-rapl:0", 1_500_000),
        ("intel-rapl:1", 500_000),
        ("intel-rapl:0:0", 900_000),
    ):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "energy_uj").write_text(f"{energy}\n")
    assert energy_j() == 2.0
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert energy_j() is None
