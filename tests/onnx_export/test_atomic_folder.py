"""A bundle's folder appears whole or not at all."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import pytest

from fleet.errors import ConfigError
from fleet.utils import cli_runtime
from onnx_export.__main__ import app
from onnx_export.atomic_folder import staged

WRITE_AND_HANG = """
import sys, time
from pathlib import Path
from onnx_export.atomic_folder import staged
with staged(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Let this process write no file larger than this; a write fails as with a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("num_bytes", [20_000, 250_000], ids=["for a graph", "for the cloud"])
def test_a_disk_without_room_leaves_nothing_and_one_clear_line(
    num_bytes: int,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "here" / "bundle"
    arguments = ["--out", str(out), "--exits", "1,2", "--model", str(tiny_checkpoint)]
    monkeypatch.setattr(sys, "argv", ["onnx_export", *arguments])
    monkeypatch.setattr(cli_runtime, "set_up_log", lambda: None)  # it is for a whole process
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with file_size_limit(num_bytes), pytest.raises(SystemExit) as ended:
        cli_runtime.run_command("python -m onnx_export", app)
    assert ended.value.code == 1
    errors = capsys.readouterr().err
    line = errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert line.startswith("python -m onnx_export: cannot write the bundle")
    assert "File too large" in line
    assert list((tmp_path / "here").iterdir()) == []


def test_the_files_of_a_killed_export_are_removed_by_the_next(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with subprocess.Popen(
        [sys.executable, "-c", WRITE_AND_HANG, str(out)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    with staged(out) as folder:
        assert list(folder.iterdir()) == []
        (folder / "whole").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert [path.name for path in out.iterdir()] == ["whole"]


def test_a_second_export_waits_and_finds_the_folder_in_use(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    waiting = Event()
    results = list[str]()

    def second() -> None:
        try:
            with staged(out, lambda _: waiting.set()):
                results.append("wrote")
        except ConfigError as error:
            results.append(str(error))

    thread = Thread(target=second)
    with staged(out) as folder:
        (folder / "file").write_text("first")
        thread.start()
        assert waiting.wait(60)
    thread.join(60)
    assert len(results) == 1
    assert "is not an empty folder" in results[0]
    assert (out / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_empty_folder_keeps_its_mode(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    out.mkdir(mode=0o700)
    with staged(out) as folder:
        folder.chmod(0o755)
    assert out.stat().st_mode & 0o777 == 0o700
