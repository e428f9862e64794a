"""What an export's result depends on beside its inputs: this package's sources and the tools' versions."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

PACKAGE: Final = Path(__file__).parent
TOOLS: Final = ("cecollm-fleet", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")
NOT_IN_BUNDLE: Final = ("__main__.py", "default.py")


def tool_versions() -> dict[str, str]:
    """Versions of the tools, read without importing them; ``none`` for one that is missing."""
    return {tool: installed_version(tool) for tool in TOOLS}


def installed_version(package: str) -> str:
    """A package's version, or ``none``."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


@cache
def source_digest() -> str:
    """SHA-256, in hex, of the sources that make bundles and the tools' versions. Training makes heads, not bundles."""
    paths = [path for path in sorted(PACKAGE.glob("*.py")) if path.name not in NOT_IN_BUNDLE]
    digest = hashlib.sha256(repr(tool_versions()).encode())
    for path in (*paths, PACKAGE.parent / "fleet/bundles/manifest.py"):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
