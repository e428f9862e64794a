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
            _place(content, folder)
    except OSError as error:
        raise ConfigError(
            f"cannot keep bundle {manifest.bundle_id} in {store}: {error.strerror or error}; "
            "make room, or check the folder's rights"
        ) from None
    return Bundle(folder, manifest)


def _link(source: Path, copy: Path) -> None:
    """Link or copy a file; a missing one is reported by the check that follows."""
    if not source.is_file():
        return
    copy.parent.mkdir(exist_ok=True)
    try:
        os.link(source.resolve(), copy)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, copy)


def _place(content: Path, folder: Path) -> None:
    """Rename the folder into its place, unless another process has made the same one."""
    try:
        content.rename(folder)
    except OSError:
        if not (folder / MANIFEST_FILE).is_file():
            raise
