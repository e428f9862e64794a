"""`fleet sessions`: the latest sessions between devices and workers."""

from __future__ import annotations

from typing import Annotated

import typer

from fleet.cli.console import new_console
from fleet.cli.options import MAX_ROWS, HomeOption, JsonOption
from fleet.cli.views import print_rows
from fleet.server.home import FleetHome


def sessions(
    device: Annotated[str | None, typer.Argument(help="Only of this device.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=MAX_ROWS, help="Maximum number.")] = 50,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the latest sessions between devices and workers."""
    with FleetHome.load(folder).registry() as registry:
        rows = registry.stats.sessions(device, limit)
    print_rows(new_console(), rows, "sessions", as_json=as_json)
