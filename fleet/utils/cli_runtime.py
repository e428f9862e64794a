"""Conduct of every command line: stop on a signal, and print an expected error as one line."""

from __future__ import annotations

import _thread
import io
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fleet.errors import ConfigError, FleetError
from fleet.utils.log_format import set_up_log
from fleet.utils.paths import user_name
from fleet.utils.printable import printable
from fleet.utils.service_manager import STOPPING, notify

CHECK_S: Final = 0.25


def stop_event() -> threading.Event:
    """Return an event that SIGTERM or SIGINT sets; it is also reported to the service manager."""
    stop = threading.Event()

    def end() -> None:
        stop.set()
        notify(STOPPING)

    def on_signal(*_: object) -> None:
        # The interrupted code may hold the event's lock, so `set` must not be called here.
        _thread.start_new_thread(end, ())

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    return stop


def wait_stopped(stop: threading.Event) -> None:
    """Wait until `stop` is set; for the main thread, which alone runs signal handlers."""
    # The kernel may deliver a signal to another thread, such as one that is being started, and
    # that does not wake the main thread.
    while not stop.wait(CHECK_S):
        pass


def run_command(name: str, command: Callable[[], object]) -> None:
    """Run a command line; an expected error is one line on stderr and exit status 1.

    Expected are a FleetError, an error of the system, such as a full disk or a file that this user
    may not use, and text that is not Unicode.
    """
    set_up_log()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may not know each character
            stream.reconfigure(errors="backslashreplace")
    try:
        command()
    except (FleetError, OSError, UnicodeEncodeError) as error:
        line = printable(_error_line(error).strip()).replace("\n", "\\n")
        print(f"{name}: {line}", file=sys.stderr)
        sys.exit(1)


def _error_line(error: FleetError | OSError | UnicodeEncodeError) -> str:
    if isinstance(error, PermissionError) and error.filename is not None:
        return (
            f"{error.filename}: {error.strerror} for the user {user_name()}; "
            "run this as the file's owner, or name another folder"
        )
    if isinstance(error, OSError):
        place = "" if error.filename is None else f"{error.filename}: "
        reason = error.strerror or str(error)
        return f"{place}{reason}; correct that, or name another file or folder"
    if isinstance(error, UnicodeEncodeError):
        character = error.object[error.start : error.end]
        return f"expected text that UTF-8 can hold, got {character!r}; remove it"
    return str(error)


def check_writable(**paths: Path | None) -> None:
    """Raise ConfigError, before the work, when a file, by option, cannot be written."""
    for option, path in paths.items():
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ConfigError(f"--{option} {path}: expected a file in a folder that exists")


def check_free(out: Path) -> None:
    """Raise ConfigError unless `out` does not exist or is an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"{out} exists and is not an empty folder; remove it or choose another --out"
        )
