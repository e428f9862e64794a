"""`fleet bundle`: verify, sign, add, rename, remove and list bundles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

from fleet.bundles.manifest import Bundle
from fleet.bundles.signature import SIGNATURE_FILE, sign_bundle
from fleet.bundles.verify import Verdict, verify_bundle
from fleet.cli.access import call_fleet, own_home
from fleet.cli.fitted_table import FittedTable
from fleet.cli.options import HomeOption, JsonOption, format_time, print_json
from fleet.errors import BundleError, ConfigError
from fleet.operator_api.bundle_operations import (
    LIST_BUNDLES,
    REMOVE_BUNDLE,
    RENAME_BUNDLE,
    BundleNaming,
    BundleRemoval,
    StoredBundle,
)
from fleet.operator_api.operation import NoFields
from fleet.server.home import FleetHome
from fleet.utils.command_group import CommandGroup
from fleet.utils.console import new_console, outside_text
from fleet.utils.path_options import path_argument, path_option
from fleet.utils.printable import command_line, count, print_line, printable_line

MB: Final = 1_000_000

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    help="Verify, sign, add and roll out bundles.",
    rich_markup_mode=None,
)

BundleArgument = Annotated[Path, path_argument(metavar="DIR", help="The bundle's folder.")]
PublicKeyOption = Annotated[
    Path | None, path_option(help="Public key or certificate (PEM) of the signature.")
]
BundleIdArgument = Annotated[
    str,
    typer.Argument(
        metavar="BUNDLE",
        help="A bundle's name, its id, or the first 4 or more digits of its id.",
    ),
]
NameArgument = Annotated[str, typer.Argument(help="New name, which no other bundle has.")]
NameOption = Annotated[str | None, typer.Option(help="Name of the bundle.")]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Also when a completed roll-out could go back to it.")
]
PrivateKeyOption = Annotated[Path, path_option(help="Private key (PEM, P-256).")]


@app.command()
def verify(
    source: BundleArgument, key: PublicKeyOption = None, as_json: JsonOption = False
) -> None:
    """Verify manifest, hashes, shapes and signature of a bundle; exit status 1 for a finding."""
    verdict = verify_bundle(source, key)
    if as_json:
        print_json(verdict)
    else:
        _print_verdict(source, verdict)
    if not verdict.ok:
        raise typer.Exit(1)


def _print_verdict(source: Path, verdict: Verdict) -> None:
    for finding in verdict.findings:
        typer.echo(f"fleet: {printable_line(finding)}", err=True)
    for note in verdict.notes:
        print_line(note)
    state = "good" if verdict.ok else f"not good: {count(len(verdict.findings), 'finding')}"
    print_line(f"bundle {verdict.bundle_id or source} is {state}; signature: {verdict.signature}")


@app.command()
def sign(source: BundleArgument, key: PrivateKeyOption) -> None:
    """Check a bundle and sign its manifest."""
    bundle_id = Bundle.load(source).manifest.bundle_id
    try:
        sign_bundle(source, key)
    except OSError as error:
        raise ConfigError(
            f"cannot write {source / SIGNATURE_FILE}: {error.strerror}; choose a folder of yours"
        ) from None
    print_line(f"signed bundle {bundle_id}: {source / SIGNATURE_FILE}")


@app.command()
def add(
    source: BundleArgument,
    name: NameOption = None,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a bundle, sign it with the fleet's key and offer it to devices."""
    home = own_home(folder, "bundle add")
    verdict = verify_bundle(source)
    if not verdict.ok:
        num_others = len(verdict.findings) - 1
        others = f", and {num_others} more" if num_others else ""
        raise BundleError(
            f"{source} is not added: {verdict.findings[0]}{others}; "
            f"see {command_line('fleet', 'bundle', 'verify', source)}"
        )
    bundle_id = _keep(home, source, verdict.bundle_id or "", name)
    copy = home.bundles / bundle_id
    if as_json:
        print_json({"bundle_id": bundle_id, "name": name, "folder": str(copy)})
    else:
        print_line(
            f"bundle {bundle_id} is in {copy}; next: fleet bundle rollout {name or bundle_id}"
        )


def _keep(home: FleetHome, source: Path, bundle_id: str, name: str | None) -> str:
    """Keep a bundle under a name, which is checked before any file is written; its id."""
    with home.registry() as registry:
        if name is not None:
            registry.rollouts.check_bundle_name(name, bundle_id)
        bundle_id = home.keep_bundle(source)
        if name is not None:
            registry.rollouts.rename_bundle(bundle_id, name)
    return bundle_id


@app.command()
def rename(
    bundle: BundleIdArgument,
    name: NameArgument,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a bundle a name, which every command accepts instead of its id."""
    named = call_fleet(folder, RENAME_BUNDLE, BundleNaming(bundle=bundle, name=name))
    if as_json:
        print_json(named)
    else:
        print_line(f"bundle {named.bundle_id} is named {name}")


@app.command()
def remove(
    bundle: BundleIdArgument,
    force: ForceOption = False,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove a bundle that no device needs, and delete its files from the fleet's folder."""
    removed = call_fleet(folder, REMOVE_BUNDLE, BundleRemoval(bundle=bundle, force=force))
    if as_json:
        print_json(removed)
    else:
        freed_mb = removed.freed_bytes / MB
        print_line(f"bundle {removed.bundle_id} is removed; {freed_mb:,.1f} MB are free")


@app.command("list")
def list_bundles(folder: HomeOption = None, as_json: JsonOption = False) -> None:
    """List the bundles: their size on disk, devices and workers, and an open roll-out."""
    rows = call_fleet(folder, LIST_BUNDLES, NoFields()).bundles
    if as_json:
        print_json(rows)
    elif rows:
        new_console().print(bundles_table(rows))
    else:
        print("bundles: none yet; add one with 'fleet bundle add DIR'")


def bundles_table(rows: Sequence[StoredBundle]) -> FittedTable:
    """The registry's bundles as a table of at most 80 columns."""
    table = FittedTable(title="bundles", title_justify="left", show_lines=True)
    table.add_column("bundle", min_width=32, overflow="fold")
    table.add_column("MB", justify="right")
    table.add_column("devices")
    table.add_column("workers", overflow="fold")
    table.add_column("roll-out")
    for row in rows:
        lines = [row.bundle_id, row.name, row.model, f"added {format_time(row.added_at)}"]
        table.add_row(
            outside_text("\n".join(filter(None, lines))),
            "no files" if row.disk_bytes is None else f"{row.disk_bytes / MB:,.1f}",
            f"{row.devices:,} on it\n{row.wanted:,} desired",
            outside_text("\n".join(row.workers) or "-"),
            "-" if row.rollout is None else f"{row.rollout}:\n{row.rollout_state}",
        )
    return table
