"""`fleet bundle`: verify, sign, add and list bundles."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.table import Table

from fleet.bundles.manifest import Bundle
from fleet.bundles.signature import SIGNATURE_FILE, sign_bundle
from fleet.bundles.verify import Verdict, verify_bundle
from fleet.cli.console import new_console, outside_text
from fleet.cli.options import HomeOption, JsonOption, print_json
from fleet.errors import BundleError, ConfigError
from fleet.registry.results import BundleRow
from fleet.server.home import FleetHome
from fleet.utils.printable import count, printable

MB: Final = 1_000_000

app = typer.Typer(
    no_args_is_help=True, help="Verify, sign, add and roll out bundles.", rich_markup_mode=None
)

BundleArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The bundle's folder.")]
PublicKeyOption = Annotated[
    Path | None, typer.Option(help="Public key or certificate (PEM) of the signature.")
]
PrivateKeyOption = Annotated[Path, typer.Option(help="Private key (PEM, P-256).")]


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
        typer.echo(f"fleet: {printable(finding)}", err=True)
    for note in verdict.notes:
        print(printable(note))
    state = "good" if verdict.ok else f"not good: {count(len(verdict.findings), 'finding')}"
    print(f"bundle {verdict.bundle_id or source} is {state}; signature: {verdict.signature}")


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
    print(f"signed bundle {bundle_id}: {source / SIGNATURE_FILE}")


@app.command()
def add(source: BundleArgument, folder: HomeOption = None, as_json: JsonOption = False) -> None:
    """Check a bundle, sign it with the fleet's key and offer it to devices."""
    home = FleetHome.load(folder)
    verdict = verify_bundle(source)
    if not verdict.ok:
        num_others = len(verdict.findings) - 1
        others = f", and {num_others} more" if num_others else ""
        raise BundleError(
            f"{source} is not added: {verdict.findings[0]}{others}; "
            f"see '{shlex.join(['fleet', 'bundle', 'verify', str(source)])}'"
        )
    bundle_id = home.keep_bundle(source)
    copy = home.bundles / bundle_id
    if as_json:
        print_json({"bundle_id": bundle_id, "folder": str(copy)})
    else:
        print(f"bundle {bundle_id} is in {copy}; next: fleet bundle rollout {bundle_id}")


@app.command("list")
def list_bundles(folder: HomeOption = None, as_json: JsonOption = False) -> None:
    """List the bundles: their devices, their workers, and an open roll-out."""
    with FleetHome.load(folder).registry() as registry:
        rows = registry.rollouts.bundles()
    if as_json:
        print_json(rows)
    elif rows:
        new_console().print(bundles_table(rows))
    else:
        print("bundles: none yet; add one with 'fleet bundle add DIR'")


def bundles_table(rows: Sequence[BundleRow]) -> Table:
    """The registry's bundles as a table of at most 80 columns."""
    table = Table(title="bundles", title_justify="left", show_lines=True)
    table.add_column("bundle", min_width=32, overflow="fold")
    table.add_column("MB", justify="right")
    table.add_column("devices")
    table.add_column("workers", overflow="fold")
    table.add_column("roll-out")
    for row in rows:
        table.add_row(
            outside_text(f"{row.bundle_id}\n{row.model}"),
            f"{row.num_bytes / MB:,.1f}",
            f"{row.devices:,} on it\n{row.wanted:,} desired",
            outside_text("\n".join(row.workers) or "-"),
            "-" if row.rollout is None else f"{row.rollout}:\n{row.rollout_state}",
        )
    return table
