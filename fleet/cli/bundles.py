"""`fleet bundle add` and `fleet bundle list`: the bundles that the server hands out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from fleet.cli.stats import JsonOption, StateOption
from fleet.errors import BundleError
from fleet.server.home import FleetHome

MB: Final = 1_000_000


def add(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The bundle's folder.")],
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a bundle, sign it with the fleet's key and keep it, so that devices can fetch it."""
    from fleet.bundles.verify import verify_bundle

    fleet = FleetHome.load(state or FleetHome.default_folder())
    verdict = verify_bundle(folder)
    if not verdict.ok:
        more = f", and {len(verdict.findings) - 1} more" if len(verdict.findings) > 1 else ""
        raise BundleError(
            f"{folder} is not added: {verdict.findings[0]}{more}; see 'fleet bundle verify {folder}'"
        )
    bundle_id = fleet.keep_bundle(folder)
    kept = fleet.bundles / bundle_id
    if as_json:
        print(msgspec.json.encode({"bundle_id": bundle_id, "folder": str(kept)}).decode())
    else:
        print(f"bundle {bundle_id} is in {kept}; next: fleet bundle rollout {bundle_id}")


def list_bundles(state: StateOption = None, as_json: JsonOption = False) -> None:
    """List the bundles: devices that serve or want each, workers, an open roll-out."""
    with FleetHome.load(state or FleetHome.default_folder()).registry() as registry:
        rows = registry.bundles()
    if as_json:
        print(msgspec.json.encode(rows).decode())
    elif rows:
        Console().print(table_of(rows))
    else:
        print("bundles: none yet; add one with 'fleet bundle add DIR'")


def table_of(rows: Sequence[Any]) -> Table:
    """Rows of the registry's bundles as a table of at most 80 columns."""
    table = Table(title="bundles", title_justify="left", show_lines=True)
    table.add_column("bundle", min_width=32, overflow="fold")
    table.add_column("MB", justify="right")
    table.add_column("devices")
    table.add_column("workers", overflow="fold")
    table.add_column("roll-out")
    for row in rows:
        table.add_row(
            f"{row.bundle_id}\n{row.model}",
            f"{row.num_bytes / MB:,.1f}",
            f"{row.devices:,} on it\n{row.wanted:,} wanted",
            "\n".join(row.workers) or "-",
            "-" if row.rollout is None else f"{row.rollout}:\n{row.rollout_state}",
        )
    return table


def add_bundle_commands(app: typer.Typer) -> None:
    """Mounts the commands of this file."""
    app.command("add")(add)
    app.command("list")(list_bundles)
