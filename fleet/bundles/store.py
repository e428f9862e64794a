"""Bundles that a server hands out: one folder each, named after its id, which appears whole or not at all."""

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
    """The bundle in `source` as one of `store`, signed by `sign(folder)`; nothing is done for one that is there.

    Files are hard links where both folders are on one disk, else copies. Only what the manifest names is taken.

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
        with tempfile.TemporaryDirectory(dir=store, prefix=f".{manifest.bundle_id}-") as made:
            content = Path(made) / "bundle"
            content.mkdir()
            for entry in manifest.files:
                _link(source / entry.path, content / entry.path)
            write_manifest(content, manifest)
            Bundle.load(content)
            sign(content)
            _place(content, folder)
    except OSError as error:
        raise ConfigError(
            f"cannot keep bundle {manifest.bundle_id} in {store}: {error.strerror or error}; make room, or check the "
            "folder's rights"
        ) from None
    return Bundle(folder, manifest)


def _link(source: Path, copy: Path) -> None:
    """Leaves out what is missing: the check that follows says so."""
    if not source.is_file():
        return
    copy.parent.mkdir(exist_ok=True)
    try:
        os.link(source.resolve(), copy)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, copy)


def _place(content: Path, folder: Path) -> None:
    """Another process may have been faster; its folder is as good as ours."""
    try:
        content.rename(folder)
    except OSError:
        if not (folder / MANIFEST_FILE).is_file():
            raise
