"""The default model's bundle, built once and kept in the user's cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import platformdirs

from fleet.errors import ConfigError
from fleet.manifest import MANIFEST_FILE
from onnx_export.config import ExportConfig, require_packages

EXITS: Final = (8, 15)
PACKAGE: Final = Path(__file__).parent
NOT_IN_BUNDLE: Final = ("__main__.py", "default.py", "train.py", "corpus.py", "fitting.py")
TOOLS: Final = ("torch", "transformers", "onnx", "onnxruntime")


def default_bundle(progress: Callable[[str], None] = lambda _: None) -> Path:
    """Folder of the default bundle: exits 8 and 15, int8. The first call fetches the model and builds it (minutes).

    Raises:
        MissingExtraError: it has to be built and the extra ``export`` is not installed.
        ExportError: the model cannot be fetched or exported.
    """
    folder = platformdirs.user_cache_path("cecollm-fleet") / "bundles" / f"default-{build_key()}"
    if (folder / MANIFEST_FILE).is_file():
        return folder
    require_packages()
    progress("building the default bundle (the first time only)")
    from onnx_export.bundle import export_bundle

    try:
        export_bundle(ExportConfig(out=folder, exits=EXITS), progress)
    except (ConfigError, OSError):
        if not (folder / MANIFEST_FILE).is_file():  # else another process was faster
            raise
    return folder


def build_key() -> str:
    """Changes whenever the bundle would: hash of the heads, of this package's sources and of the tools' versions."""
    digest = hashlib.sha256()
    paths = sorted([*PACKAGE.glob("*.py"), *PACKAGE.glob("data/*.safetensors"), PACKAGE.parent / "fleet/manifest.py"])
    for path in paths:
        if path.name not in NOT_IN_BUNDLE:
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    for tool in TOOLS:
        digest.update(f"{tool} {installed_version(tool)}\n".encode())
    return digest.hexdigest()[:16]


def installed_version(package: str) -> str:
    """A package's version without importing it, or ``none``."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
