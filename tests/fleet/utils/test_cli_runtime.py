"""The stop of commands, and their errors as one line."""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fleet.errors import ConfigError
from fleet.utils import cli_runtime, command_output
from fleet.utils.cli_runtime import run_command, stop_event, wait_stopped
from fleet.utils.optional_imports import needs
from fleet.utils.paths import user_name

WAIT_S = 30.0


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
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
            f"/f/fleet.json: Permission denied for the user {user_name()}; run this as its owner",
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


def one_error(command: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> str:
    """The line of a command's expected error."""
    with pytest.raises(SystemExit) as stopped:
        run_command("fleet", command)
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_deleted_current_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_runtime, "set_up_log", lambda: None)
    folder = tmp_path / "deleted"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()

    def write() -> None:
        try:
            Path("x").write_bytes(b"")
        except OSError:
            raise ConfigError("cannot write x; make room") from None

    assert "the current folder no longer exists" in one_error(write, capsys)
    with pytest.raises(ConfigError, match="the current folder no longer exists"), needs("worker"):
        pass


@pytest.mark.parametrize("buffering", [0, 4096])
def test_an_output_that_cannot_be_written_is_named(
    buffering: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_runtime, "set_up_log", lambda: None)
    with Path("/dev/full").open("wb", buffering) as full:
        text = io.TextIOWrapper(full, "utf-8", write_through=not buffering)
        monkeypatch.setattr(sys, "stdout", text)
        line = one_error(lambda: print("text"), capsys)
        sys.stdout.close()  # as at the end of Python: the text goes nowhere
        text.detach()
    assert line == "fleet: cannot write to the output: No space left on device; send it elsewhere"


def test_a_closed_pipe_ends_a_command_without_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_runtime, "set_up_log", lambda: None)
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit):
            run_command("fleet", lambda: print("text"))
    assert not capsys.readouterr().err


def test_a_command_runs_without_stdin_and_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    for name in ("stdin", "stderr"):
        monkeypatch.setattr(sys, name, None)
    lines: list[bytes] = []

    def work() -> None:
        logging.getLogger("fleet").warning("text")
        lines.append(sys.stdin.buffer.readline())

    run_command("fleet", work)
    assert lines == [b""]
    sys.stdin.close()
    sys.stderr.close()


def test_a_closed_output_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_runtime, "set_up_log", lambda: None)
    monkeypatch.setattr(sys, "stdout", None)
    calls: list[int] = []
    line = one_error(lambda: calls.append(1), capsys)
    assert line.startswith("fleet: standard output is closed")
    assert not calls


def test_closed_descriptors_lead_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    descriptors = iter([1, 2, 7])
    closed: list[int] = []
    monkeypatch.setattr("fleet.utils.command_output.os.open", lambda *_: next(descriptors))
    monkeypatch.setattr("fleet.utils.command_output.os.close", closed.append)
    command_output.open_closed_streams()
    assert closed == [7]


@pytest.mark.parametrize("size", ["0", "-5", "abc", "\u00b2", "9" * 5000])
def test_an_odd_width_of_the_terminal_does_not_count(
    size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_runtime, "set_up_log", lambda: None)
    monkeypatch.setenv("COLUMNS", size)
    run_command("fleet", lambda: None)
    assert "COLUMNS" not in os.environ


PROGRAM = """
import sys, tempfile, time
from fleet.utils.cli_runtime import run_command

def work():
    with tempfile.TemporaryDirectory(dir=sys.argv[1]):
        print("ready", flush=True)
        time.sleep(60)

run_command("fleet", work)
"""


CYCLE = """
from fleet.utils.cli_runtime import run_command

class Cycle:
    def __del__(self):
        print("collected", flush=True)

def work():
    cycle = Cycle()
    cycle.own = cycle

run_command("fleet", work)
"""


def test_a_command_ends_without_a_search_for_garbage() -> None:
    command = [sys.executable, "-c", CYCLE]
    assert subprocess.check_output(command, text=True, timeout=WAIT_S) == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_after_its_cleanup(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(WAIT_S) == -number
    assert not list(tmp_path.iterdir())
