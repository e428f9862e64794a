"""Conduct of every command line: stop on a signal, and print an expected error as one line."""

from __future__ import annotations

import _thread
import atexit
import gc
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

from fleet.errors import ConfigError, FleetError
from fleet.utils.command_output import (
    check_output,
    is_output_error,
    name_output,
    open_closed_streams,
)
from fleet.utils.log_format import set_up_log
from fleet.utils.paths import NO_CURRENT_FOLDER, has_current_folder, rights_remedy, user_name
from fleet.utils.printable import printable_line
from fleet.utils.service_manager import STOPPING, notify

CHECK_S: Final = 0.25
MAX_COLUMNS: Final = 10_000


class _Ended(BaseException):
    """A signal ends the process, after the cleanup of what the command has begun."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


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
    may not use, and text that is not Unicode. A closed pipe ends the process without a line.
    """
    # A search for garbage among all objects at exit takes a second where PyTorch is loaded.
    atexit.register(gc.freeze)
    open_closed_streams()
    set_up_log()
    _drop_odd_sizes()
    name_output()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may not know each character
            stream.reconfigure(errors="backslashreplace")
    try:
        with _cleanup_on_signals():
            _run_to_the_end(command)
    except (FleetError, OSError, UnicodeEncodeError) as error:
        if not _is_closed_pipe(error):
            print(f"{name}: {printable_line(_error_line(error).strip())}", file=sys.stderr)
        sys.exit(1)


def _run_to_the_end(command: Callable[[], object]) -> None:
    """Run a command, and write out all that it has printed."""
    check_output()
    try:
        command()
    finally:
        sys.stdout.flush()


def _is_closed_pipe(error: Exception) -> bool:
    return isinstance(error, BrokenPipeError) and is_output_error(error)


def _drop_odd_sizes() -> None:
    """Let the terminal's own size count unless that of the environment is a usable number."""
    for name in ("COLUMNS", "LINES"):
        size = os.environ.get(name, "")
        if not (size.isdecimal() and len(size) < 6 and 0 < int(size) <= MAX_COLUMNS):
            os.environ.pop(name, None)


@contextmanager
def _cleanup_on_signals() -> Iterator[None]:
    """Remove temporary files and end child processes before SIGTERM or SIGHUP ends this one.

    A second signal ends it at once. `stop_event` replaces the handler of SIGTERM.
    """

    def end(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise _Ended(number)

    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is signal.SIG_DFL  # `nohup` ignores SIGHUP
    ]
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    except _Ended as ended:
        signal.raise_signal(ended.number)
    finally:
        for number in numbers:
            if signal.getsignal(number) is end:
                signal.signal(number, signal.SIG_DFL)


def _error_line(error: FleetError | OSError | UnicodeEncodeError) -> str:
    if _misses_folder(error):
        return NO_CURRENT_FOLDER
    if isinstance(error, PermissionError) and error.filename is not None:
        return (
            f"{error.filename}: {error.strerror} for the user {user_name()}; "
            f"{rights_remedy(Path(os.fsdecode(error.filename)))}, or name another folder"
        )
    if is_output_error(error):
        return f"cannot write to the output: {error.strerror}; send it elsewhere"
    if isinstance(error, OSError):
        place = "" if error.filename is None else f"{error.filename}: "
        reason = error.strerror or str(error)
        return f"{place}{reason}; correct that, or name another file or folder"
    if isinstance(error, UnicodeEncodeError):
        character = error.object[error.start : error.end]
        return f"expected text that UTF-8 can hold, got {character!r}; remove it"
    return str(error)


def _misses_folder(error: BaseException | None) -> bool:
    """Whether a file was not found because the current folder was deleted."""
    while error and not isinstance(error, FileNotFoundError):
        error = error.__context__
    return error is not None and not has_current_folder()


def check_writable(**paths: Path | None) -> None:
    """Raise ConfigError, before the work, when a file, by option, cannot be written."""
    for option, path in paths.items():
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ConfigError(f"--{option} {path}: expected a file in a folder that exists")


def check_free(out: Path, option: str = "--out") -> None:
    """Raise ConfigError unless `out`, which `option` names, is missing or an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"{out} exists and is not an empty folder; remove it or choose another {option}"
        )
