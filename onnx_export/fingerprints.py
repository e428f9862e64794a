"""Fingerprints of an export's implicit inputs: this package's sources and the tools' versions."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

PACKAGE: Final = Path(__file__).parent
TOOLS: Final = ("cecollm-fleet", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")
NOT_IN_BUNDLE: Final = ("__main__.py", "default_bundle.py")


def tool_versions() -> dict[str, str]:
    """Return the tools' versions, read without an import; that of a missing one is ``none``."""
    return {tool: tool_version(tool) for tool in TOOLS}


def tool_version(package: str) -> str:
    """Return a package's version, or ``none``."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


@cache
def source_digest() -> str:
    """Return the SHA-256, in hex, of the sources that make bundles and of the tools' versions.

    Training is left out: it makes heads, not bundles.
    """
    paths = [path for path in sorted(PACKAGE.glob("*.py")) if path.name not in NOT_IN_BUNDLE]
    paths.append(PACKAGE.parent / "fleet/bundles/manifest.py")
    digest = hashlib.sha256(repr(tool_versions()).encode())
    for path in paths:
        digest.update(path.name.encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
