"""A default is written once: in the configuration, from which programs and pages read it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.architecture.sources import PACKAGES, modules

NUMBER_AS_DEFAULT = re.compile(r"\bdefault\b[^)]*\d", re.IGNORECASE)


def config_fields() -> Iterator[tuple[str, str]]:
    """Yield the name and the default of each field of a configuration."""
    for _, tree in modules(*PACKAGES):
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                for field in node.body:
                    if isinstance(field, ast.AnnAssign) and field.value:
                        yield ast.unparse(field.target), ast.unparse(field.value)


def test_no_help_text_repeats_a_number_as_the_default() -> None:
    found = [
        f"{path}:{node.lineno}: {ast.unparse(node.value)[:60]}"
        for path, tree in modules(*PACKAGES)
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "help"
        if isinstance(node.value, ast.Constant) and NUMBER_AS_DEFAULT.search(str(node.value.value))
    ]
    assert found == []


def test_no_command_repeats_the_default_of_a_configuration() -> None:
    fields = set(config_fields())
    found = [
        f"{path}:{value.lineno}: {argument.arg} = {ast.unparse(value)}"
        for path, tree in modules(*PACKAGES)
        if "cli" in path or path.endswith("__main__.py")
        for command in tree.body
        if isinstance(command, ast.FunctionDef)
        for argument, value in zip(
            reversed(command.args.args), reversed(command.args.defaults), strict=False
        )
        if isinstance(value, ast.Constant) and value.value
        if (argument.arg, ast.unparse(value)) in fields
    ]
    assert found == []
