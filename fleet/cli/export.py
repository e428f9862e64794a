"""`fleet export`, `fleet bundle verify` and `fleet bundle sign`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from fleet.errors import ConfigError
from fleet.utils.optional_imports import load

bundle = typer.Typer(
    no_args_is_help=True, help="Check, sign, keep and roll out bundles.", rich_markup_mode=None
)
FOLDER = typer.Argument(metavar="DIR", help="The bundle's folder.")
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def export(context: typer.Context) -> None:
    """Export a model as a bundle for devices and cloud workers."""
    load("onnx_export.__main__").app(
        args=context.args, prog_name="fleet export", standalone_mode=False
    )


@bundle.command()
def verify(
    folder: Annotated[Path, FOLDER],
    key: Annotated[
        Path | None, typer.Option(help="Public key or certificate (PEM) that must have signed it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check manifest, hashes, shapes and signature of a bundle; exit status 1 when something is wrong."""
    from fleet.bundles.verify import verify_bundle

    verdict = verify_bundle(folder, key)
    if as_json:
        print(msgspec.json.encode(verdict).decode())
    else:
        for finding in verdict.findings:
            typer.echo(f"fleet: {finding}", err=True)
        for note in verdict.notes:
            print(note)
        state = "good" if verdict.ok else f"not good: {len(verdict.findings)} findings"
        print(f"bundle {verdict.bundle_id or folder} is {state}; signature: {verdict.signature}")
    if not verdict.ok:
        raise typer.Exit(1)


@bundle.command()
def sign(
    folder: Annotated[Path, FOLDER],
    key: Annotated[Path, typer.Option(help="Private key (PEM, P-256).")],
) -> None:
    """Check a bundle and sign its manifest."""
    from fleet.bundles.manifest import Bundle
    from fleet.bundles.signature import SIGNATURE_FILE, sign_bundle

    checked = Bundle.load(folder)
    try:
        sign_bundle(folder, key)
    except OSError as error:
        raise ConfigError(
            f"cannot write {folder / SIGNATURE_FILE}: {error.strerror}; choose a folder of yours"
        ) from None
    print(f"signed bundle {checked.manifest.bundle_id}: {folder / SIGNATURE_FILE}")
