"""The stop of commands, and their errors as one line."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from fleet.errors import ConfigError
from fleet.utils import cli_runtime
from fleet.utils.cli_runtime import run_command, stop_event, wait_stopped
from fleet.utils.paths import user_name

WAIT_S = 30.0


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    numbers = signal.SIGTERM, signal.SIGINT
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_command_at_any_time(number: signal.Signals) -> None:
    stop = stop_event()
    with stop._cond:  # type: ignore[attr-defined]  # as it is for a moment in `stop.wait`
        signal.raise_signal(number)
    assert stop.wait(WAIT_S)


def test_a_signal_to_another_thread_stops_a_command() -> None:
    stop = stop_event()
    waiting = threading.Timer(
        0.1, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    )
    waiting.start()
    wait_stopped(stop)
    waiting.join(WAIT_S)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "/m/a"), "/m/a: Read-only file system; "),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device; "),
        (
            PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/f/fleet.json"),
            f"/f/fleet.json: Permission denied for the user {user_name()}; run this as the file's",
        ),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a\nb"), "a\\nb: Is a directory; "),
        (ConfigError("device a refused: no\nfleet: all is well"), "no\\nfleet: all is well"),
    ],
)
def test_an_error_of_the_system_or_from_outside_is_one_line(
    error: Exception,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli_runtime, "set_up_log", lambda: None)  # it is for a whole process

    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_command("fleet", fail)
    assert stopped.value.code == 1
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith("fleet: ")
    assert line in printed
