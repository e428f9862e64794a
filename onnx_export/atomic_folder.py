"""A folder that appears whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fleet.utils.cli_runtime import check_free


@contextmanager
def staged(out: Path, progress: Callable[[str], None] = lambda _: None) -> Iterator[Path]:
    """An empty folder beside `out` that becomes `out` at the end; after an error nothing is left.

    One export at a time writes `out`, others wait for it. What a killed one left is removed by the next.

    Raises:
        ConfigError: `out` is in use.
        OSError: it cannot be written.
    """
    partial, lock_file = (out.parent / f".{out.name}.{suffix}" for suffix in ("partial", "lock"))
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock_file, lambda: progress(f"waiting for another export into {out}")):
        check_free(out)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            yield partial
            if out.exists():
                out.rmdir()
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Holds the lock file `path`, which is gone afterwards: who waits for a removed one takes a new one."""
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
