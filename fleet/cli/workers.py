"""`fleet workers`: the workers of the fleet."""

from __future__ import annotations

from fleet.cli.console import new_console
from fleet.cli.options import HomeOption, JsonOption
from fleet.cli.views import print_rows
from fleet.server.home import FleetHome


def workers(folder: HomeOption = None, as_json: JsonOption = False) -> None:
    """List the workers: online or not, draining, bundles, number of sessions."""
    with FleetHome.load(folder).registry() as registry:
        rows = registry.stats.workers()
    print_rows(new_console(), rows, "workers", as_json=as_json)
