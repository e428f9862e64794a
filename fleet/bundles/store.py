"""The store of a server's bundles: a folder for each, named by its id, complete or absent."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from fleet.bundles.manifest import MANIFEST_FILE, Bundle, read_manifest, write_manifest
from fleet.bundles.signature import SIGNATURE_FILE
from fleet.errors import ConfigError


def keep_bundle(source: Path, store: Path, sign: Callable[[Path], None]) -> Bundle:
    """Copy the bundle in `source` into `store`, signed by `sign(folder)`, unless it is there.

    Files are hard links if both folders are on one disk, else copies. Files that the manifest does
    not name are left out.

    Raises:
        BundleError: a file is missing or altered.
        ConfigError: `store` cannot be written.
    """
    manifest = read_manifest(source)
    folder = store / manifest.bundle_id
    if (folder / SIGNATURE_FILE).is_file():
        return Bundle(folder, read_manifest(folder))
    try:
        store.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=store, prefix=f".{manifest.bundle_id}-") as temporary:
            content = Path(temporary) / "bundle"
            content.mkdir()
            for entry in manifest.files:
                _link(source / entry.path, content / entry.path)
            write_manifest(content, manifest)
            Bundle.load(content)
            sign(content)
            _share_folders(content)
            _place(content, folder)
    except OSError as error:
        raise ConfigError(
            f"cannot keep bundle {manifest.bundle_id} in {store}: {error.strerror or error}; "
            "make room, or check the folder's rights"
        ) from None
    return Bundle(folder, manifest)


def bundle_bytes(store: Path, bundle_id: str) -> int | None:
    """Return the size of a bundle's files in `store`, or None if the bundle is not there."""
    folder = store / bundle_id
    if not folder.is_dir():
        return None
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def delete_bundle(store: Path, bundle_id: str) -> int:
    """Delete a bundle from `store`; return the number of bytes that are free now.

    A file that is a hard link of another one, such as of the folder that was added, frees none.

    Raises:
        ConfigError: a file cannot be deleted.
    """
    folder = store / bundle_id
    if not folder.exists():
        return 0
    doomed = store / f".{bundle_id}-removed"
    try:
        folder.rename(doomed)  # so that it is complete or absent
        stats = [path.stat() for path in doomed.rglob("*") if path.is_file()]
        shutil.rmtree(doomed)
    except OSError as error:
        raise ConfigError(
            f"bundle {bundle_id} is no longer offered, but its files in {store} cannot be deleted: "
            f"{error.strerror or error}; delete them by hand"
        ) from None
    return sum(each.st_size for each in stats if each.st_nlink == 1)


def _link(source: Path, copy: Path) -> None:
    """Link or copy a file; a missing one is reported by the check that follows."""
    if not source.is_file():
        return
    copy.parent.mkdir(exist_ok=True)
    try:
        os.link(source.resolve(), copy)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, copy)


def _share_folders(folder: Path) -> None:
    """Make a bundle's folders readable for other users, whatever the umask is, as its files are."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)


def _place(content: Path, folder: Path) -> None:
    """Rename the folder into its place, unless another process has made the same one."""
    try:
        content.rename(folder)
    except OSError:
        if not (folder / MANIFEST_FILE).is_file():
            raise
