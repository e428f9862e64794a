"""The default model's bundle, built once and kept in the user's cache.

``python -m onnx_export.default_bundle`` prints its folder, after the lines of its progress.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fleet.bundles.manifest import MANIFEST_FILE
from fleet.errors import ConfigError
from fleet.utils.cli_runtime import run_command
from fleet.utils.paths import user_cache_folder
from onnx_export.config import ExportConfig, require_packages
from onnx_export.fingerprints import PACKAGE, source_digest

EXITS: Final = (24,)
FOLDER: Final = "bundles"  # in the cache
NAME: Final = re.compile(r"default-[0-9a-f]{16}")
DATA: Final = PACKAGE / "data"


def default_bundle(progress: Callable[[str], None] = lambda _: None) -> Path:
    """Return the folder of the default bundle.

    The first call fetches the model and builds the bundle, which takes a minute or two.

    Raises:
        MissingExtraError: it has to be built and the extra ``export`` is not installed.
        ExportError: the model cannot be fetched or exported.
    """
    folder = _cache() / f"default-{build_key()}"
    manifest_file = folder / MANIFEST_FILE
    if manifest_file.is_file():
        return folder
    require_packages()
    progress("building the default bundle (the first time only)")
    from onnx_export.bundle import export_bundle

    try:
        export_bundle(ExportConfig(out=folder, exits=EXITS), progress)
    except ConfigError:
        if not manifest_file.is_file():  # else another process was faster
            raise
    return folder


def is_default_bundle(folder: Path) -> bool:
    """Whether `folder` is one of `default_bundle`, of any user and any version of the program."""
    is_name = NAME.fullmatch(folder.name) is not None
    return is_name and folder.parent.name == FOLDER


def _cache() -> Path:
    return user_cache_folder() / FOLDER


def build_key() -> str:
    """Return a hash of the bundle's inputs: exits, heads, our sources and the tools' versions."""
    config = ExportConfig(out=Path(), exits=EXITS)
    digest = hashlib.sha256(f"{source_digest()} {config}".encode())
    files = [path for path in DATA.iterdir() if path.is_file()]
    for path in sorted(files):
        digest.update(path.name.encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _print_folder() -> None:
    print(default_bundle(lambda line: print(line, flush=True)))


if __name__ == "__main__":
    run_command("default_bundle", _print_folder)
