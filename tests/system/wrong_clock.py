"""A device with a wrong clock: ``python -m tests.system.wrong_clock SECONDS run DIR``."""

from __future__ import annotations

import runpy
import sys
import time


def set_clock(seconds: int) -> None:
    """Shifts the time of day as this process's Python code sees it; the monotonic clock goes on."""
    right = time.time
    right_ns = time.time_ns
    time.time = lambda: right() + seconds
    time.time_ns = lambda: right_ns() + seconds * 1_000_000_000


if __name__ == "__main__":
    set_clock(int(sys.argv.pop(1)))
    runpy.run_module("edge_agent", run_name="__main__")
