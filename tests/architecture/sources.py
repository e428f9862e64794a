"""The syntax trees of the project's modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent.parent
PACKAGES: Final = ("fleet", "edge_agent", "cloud_broker_worker", "provisioning", "onnx_export")


def modules(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    """Yield the path, relative to the project's root, and the tree of each module in `folders`."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())


def strings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the value of each string or piece of an f-string, but of no docstring."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or id(node) in docstrings:
            continue
        if isinstance(node.value, str):
            yield node.lineno, node.value
