"""Options and arguments that are paths: ``~`` is the user's home, and an empty path is refused.

A shell leaves the ``~`` of ``--out=~/x`` as it is, and makes ``""`` of a variable that is not set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from fleet.utils.paths import expand_home


def path_option(*names: str, metavar: str = "<path>", **settings: Any) -> Any:
    """Return an option of typer for a path, or for a list of paths."""
    return typer.Option(*names, metavar=metavar, parser=parse_path, **settings)


def path_argument(**settings: Any) -> Any:
    """Return an argument of typer for a path."""
    return typer.Argument(parser=parse_path, **settings)


def parse_path(path: str | Path) -> Path:
    """Return the path that a user wrote, or the default of a parameter.

    Raises:
        typer.BadParameter: it is empty.
        ConfigError: it begins with ``~`` and this user has no home folder.
    """
    if path == "":
        raise typer.BadParameter("expected a path, got an empty text; is a variable not set?")
    return expand_home(Path(path))
