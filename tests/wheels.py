"""Wheels of other versions, built from this tree with one or another file changed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from fleet.version import __version__

ROOT: Final = Path(__file__).parents[1]
PACKAGES: Final = ("fleet", "edge_agent", "cloud_broker_worker", "onnx_export", "provisioning")
BUILD_S: Final = 120.0


def build_wheel(
    folder: Path, version: str, *, prefixes: Mapping[str, str] | None = None, requires: str = ""
) -> Path:
    """Build this tree as another version, in a new folder; return the wheel.

    `prefixes` is code by the path of the file that begins with it; `requires` is one more
    requirement.
    """
    tree = folder / f"tree-{version}"
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(ROOT / package, tree / package, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, tree / name)
    _replace(tree / "pyproject.toml", f'version = "{__version__}"', f'version = "{version}"')
    _replace(tree / "fleet/version.py", f'"{__version__}"', f'"{version}"')
    if requires:
        _replace(
            tree / "pyproject.toml", "dependencies = [", f'dependencies = [\n    "{requires}",'
        )
    for name, code in (prefixes or {}).items():
        path = tree / name
        path.write_text(
            code
            + path.read_text(encoding="utf-8").replace("from __future__ import annotations", "")
        )
    return _build(tree, folder)


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{path} has no {old}"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def _build(tree: Path, folder: Path) -> Path:
    before = {*folder.glob("*.whl")}
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*command, str(tree)], check=True, capture_output=True, timeout=BUILD_S)
    (wheel,) = {*folder.glob("*.whl")} - before
    shutil.rmtree(tree)
    return wheel
