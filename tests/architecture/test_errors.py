"""The error tree that fleet/errors.py draws is the one that the project has."""

from __future__ import annotations

import ast
import re

from fleet import errors
from tests.architecture.sources import PACKAGES, modules


def drawn_tree() -> dict[str, str]:
    """Return the parent of each error by the drawing in the module's docstring."""
    parents = {}
    path = ["FleetError"]
    for indent, name in re.findall(r"^([ |]*)\+- (\w+)", errors.__doc__ or "", re.MULTILINE):
        depth = len(indent) // 4 + 1
        path[depth:] = [name]
        parents[name] = path[depth - 1]
    return parents


def test_the_drawn_tree_is_the_class_hierarchy() -> None:
    classes = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    parents = {name: kind.__base__.__name__ for name, kind in classes.items() if kind.__base__}
    assert drawn_tree() | {"FleetError": "Exception"} == parents


def test_no_other_module_defines_an_error() -> None:
    """A private exception that steers the flow within one module is no error of the project."""
    names = drawn_tree().keys() | {"FleetError", "Exception", "BaseException"}
    found = [
        f"{path}: {node.name}"
        for path, tree in modules(*PACKAGES)
        if path != "fleet/errors.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        for base in node.bases
        if ast.unparse(base).split(".")[-1] in names or ast.unparse(base).endswith("Error")
    ]
    assert found == []
