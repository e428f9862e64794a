"""Processes on separate cores, and their cost."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

CPUCLOCK_SCHED: Final = (
    2  # of Linux: which clock of a process, in the id that clock_getcpuclockid(3) makes
)
POWERCAP: Final = Path("/sys/class/powercap")


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process, all its threads together.

    Raises:
        OSError: it has ended.
    """
    return time.clock_gettime((~pid << 3) | CPUCLOCK_SCHED)


def memory_mb(pid: int) -> dict[str, float]:
    """Return the resident memory of a process, in MB of 10^6 bytes."""
    status = dict(
        line.split(":", 1)
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    )
    names = {"rss_mb": "VmRSS", "own_rss_mb": "RssAnon", "peak_rss_mb": "VmHWM"}
    return {key: int(status[name].split()[0]) * 1024 / 1e6 for key, name in names.items()}


def two_cores() -> tuple[int, int] | None:
    """Return a core for either side, or None with only one core or no way to pin processes."""
    if not hasattr(os, "sched_getaffinity") or len(cores := sorted(os.sched_getaffinity(0))) < 2:
        return None
    return cores[0], cores[1]


@contextmanager
def started_on(core: int | None) -> Iterator[None]:
    """Pin processes that this thread starts in the block to `core`; None is any."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def energy_j() -> float | None:
    """Return the joules that the machine's processors have used since some time, by RAPL.

    None where it cannot be read.
    """
    try:
        return sum(int((zone / "energy_uj").read_text()) for zone in rapl_packages()) / 1e6 or None
    except OSError:
        return None


def rapl_packages() -> list[Path]:
    """Return RAPL's zones of whole processors."""
    return sorted(POWERCAP.glob("intel-rapl:[0-9]")) if POWERCAP.exists() else []
