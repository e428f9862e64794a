"""Small files that exist whole or not at all, even after a loss of power."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)


def write_file(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace `path` by `data` in one step; it never has wider rights than `mode`.

    As root, the file keeps its owner; a new file has the owner of its folder.

    Raises:
        OSError: it cannot be written.
    """
    temporary = _write_temporary(path, data)
    try:
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def create_file(path: Path, data: bytes) -> bytes:
    """Create `path` (mode 0600) with `data` unless it exists; its content. Raises OSError."""
    temporary = _write_temporary(path, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
    sync_folder(path.parent)
    return path.read_bytes()


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder (mode 0700) for the block. An error removes it if it is new and empty.

    Raises:
        OSError: it cannot be made.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # it is not empty
            if is_new:
                folder.rmdir()
        raise


def move_aside(path: Path, reason: object) -> None:
    """Rename a damaged file to ``NAME.damaged``, so that it can be made again, and log that.

    An earlier file of that name is replaced. Raises OSError.
    """
    aside = path.with_name(f"{path.name}.damaged")
    path.replace(aside)
    log.warning("%s is damaged (%s); it is made again, and kept as %s", path, reason, aside.name)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder, not the contents of its files, to disk; raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _keep_owner(descriptor: int, path: Path) -> None:
    """Give a new file the owner of `path`, or of its folder: a service reads what root renews."""
    if os.geteuid() != 0:
        return
    owner = (path if os.path.lexists(path) else path.parent).lstat()
    with suppress(OSError):  # a disk without owners
        os.fchown(descriptor, owner.st_uid, owner.st_gid)


def _write_temporary(path: Path, data: bytes) -> Path:
    """Write `data` to a new file (mode 0600) in the folder of `path`."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            _keep_owner(descriptor, path)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return Path(temporary)
