"""A tiny bundle in the place of the default one."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleet.bundles.manifest import Bundle
from fleet.utils.paths import PROJECT
from onnx_export.default_bundle import FOLDER, build_key


def make_default_bundle(bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a bundle the default one in a cache of its own, also for child processes."""
    folder = cache / PROJECT / FOLDER
    folder.mkdir(parents=True)
    (folder / f"default-{build_key()}").symlink_to(bundle.folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
