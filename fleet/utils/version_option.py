"""The option `--version` of each command."""

from __future__ import annotations

from typing import Annotated

import typer

from fleet.version import __version__


def print_version(is_given: bool) -> None:
    """Print the version and end the command, if the option is given."""
    if is_given:
        print(__version__)
        raise typer.Exit


VersionOption = Annotated[
    bool,
    typer.Option("--version", callback=print_version, is_eager=True, help="Print the version."),
]
