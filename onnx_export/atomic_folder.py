"""Atomic creation of a folder: it appears whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fleet.utils.cli_runtime import check_free


@contextmanager
def staged(out: Path, progress: Callable[[str], None] = lambda _: None) -> Iterator[Path]:
    """Yield an empty folder next to `out` that becomes `out` at the end.

    After an error nothing is left. One export at a time writes `out`; others wait for it. The
    next export removes the folder of a killed one.

    Raises:
        ConfigError: `out` is in use.
        OSError: it cannot be written.
    """
    partial = out.parent / f".{out.name}.partial"
    lock_file = out.parent / f".{out.name}.lock"
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock_file, lambda: progress(f"waiting for another export into {out}")):
        check_free(out)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            yield partial
            replace_empty(out, partial)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def replace_empty(out: Path, folder: Path) -> None:
    """Rename `folder` to `out`, which is missing, or empty and keeps its mode."""
    if out.exists():
        folder.chmod(out.stat().st_mode)
        out.rmdir()
    folder.rename(out)


@contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file `path` and remove it afterwards.

    A process that waited for a removed file locks a new one.
    """
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        on_wait()
        lock.acquire()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
