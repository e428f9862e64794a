"""A bundle's folder appears whole or not at all."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from threading import Event, Thread

import pytest

from fleet.errors import ConfigError
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


def export_with_limit(num_bytes: int, out: Path, model: Path) -> subprocess.CompletedProcess[str]:
    """Export in a process that cannot write files larger than this.

    It fails as with a full disk.
    """
    command = [
        sys.executable,
        "-m",
        "onnx_export",
        "--out",
        str(out),
        "--exits",
        "1,2",
        "--model",
        str(model),
    ]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=os.environ | {"XDG_CACHE_HOME": str(out.parent.parent / "cache")},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes)),
    )


@pytest.mark.parametrize("num_bytes", [20_000, 250_000], ids=["for a graph", "for the cloud"])
def test_a_disk_without_room_leaves_nothing_and_one_clear_line(
    num_bytes: int, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    result = export_with_limit(num_bytes, tmp_path / "here" / "bundle", tiny_checkpoint)
    assert result.returncode == 1
    line = result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
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
