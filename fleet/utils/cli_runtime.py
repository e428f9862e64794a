"""What every command of ours does the same way: stop on a signal, and turn our errors into one line."""

from __future__ import annotations

import _thread
import logging
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fleet.errors import ConfigError, FleetError

CHECK_S: Final = 0.25


def stop_event() -> threading.Event:
    """Set by SIGTERM or SIGINT."""
    stop = threading.Event()

    def on_signal(*_: object) -> None:
        # The event's lock may be held by what the signal interrupts, so `set` must not be called from here.
        _thread.start_new_thread(stop.set, ())

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    return stop


def wait_stopped(stop: threading.Event) -> None:
    """Returns when `stop` is set; for the main thread, which alone runs handlers.

    Looks now and then: the kernel may give a signal to another thread, one that is being started for instance, and the
    main thread is not woken then.
    """
    while not stop.wait(CHECK_S):
        pass


def run_command(name: str, command: Callable[[], object]) -> None:
    """Runs a command line; an error of ours is one line on stderr and exit status 1."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        command()
    except FleetError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(1)


def check_writable(**paths: Path | None) -> None:
    """Raises ConfigError when one of the files, by option, has no folder to be in: before the work, not after it."""
    for option, path in paths.items():
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ConfigError(f"--{option} {path}: expected a file in a folder that exists")


def check_free(out: Path) -> None:
    """Raises ConfigError unless `out` is free or an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"{out} exists and is not an empty folder; remove it or choose another --out"
        )
