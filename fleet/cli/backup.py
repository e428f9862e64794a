"""`fleet backup` and `fleet restore`: a fleet in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fleet.cli.access import own_folder, own_home
from fleet.cli.options import MAX_ROWS, HomeOption
from fleet.errors import ConfigError
from fleet.registry.results import bundle_label
from fleet.server.backup import back_up, remove_old_backups, restore_backup
from fleet.server.home import FleetHome
from fleet.utils.path_options import parse_path, path_argument
from fleet.utils.printable import print_line

FileArgument = Annotated[
    str, typer.Argument(metavar="FILE", help="New file, or a folder that gets a new file.")
]
BackupArgument = Annotated[Path, path_argument(metavar="FILE", help="File of 'fleet backup'.")]
BundlesOption = Annotated[bool, typer.Option("--bundles", help="Include the models' bundles.")]
KeepOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MAX_ROWS,
        help="With a folder: number of backups to keep; older ones are removed.",
    ),
]
NewRegistryOption = Annotated[
    str | None, typer.Option(help="URL of an empty PostgreSQL database (default: the old one's).")
]


def backup(
    file: FileArgument,
    bundles: BundlesOption = False,
    keep: KeepOption = None,
    folder: HomeOption = None,
) -> None:
    """Copy authority, registry and identities into one file, while the fleet runs."""
    place = _place_of(file)
    if keep and not place.is_dir():
        raise ConfigError(f"{file} is not a folder; leave out --keep, or name a folder of backups")
    home = own_home(folder, "backup")
    path = back_up(home, place, bundles=bundles)
    print_line(f"wrote {path} with the authority's key; protect it like the fleet's folder")
    if keep:
        for old in remove_old_backups(home, path, keep):
            print_line(f"removed {old}")


def _place_of(file: str) -> Path:
    """Return the path of a new backup. Raises ConfigError for ``-`` and for a missing folder."""
    if file == "-":
        raise ConfigError("a backup is a file, and is not printed; name one, or a folder, not -")
    path = parse_path(file)
    if file.endswith("/") and not path.is_dir():
        raise ConfigError(
            f"{file} is no folder; make it first, or name a file without / at its end"
        )
    return path


def restore_fleet(
    file: BackupArgument, registry: NewRegistryOption = None, folder: HomeOption = None
) -> None:
    """Restore a backup into a new folder."""
    home = restore_backup(file, own_folder(folder, "restore"), registry)
    with home.registry() as opened:
        num_identities = len(opened.identities.all())
        bundles = opened.rollouts.bundles()
    print_line(
        f"restored {num_identities} identities into {home.folder}; next: {_next_command(home)}"
    )
    missing = [row for row in bundles if home.bundle_folder(row.bundle_id) is None]
    if missing:
        labels = ", ".join(bundle_label(row.bundle_id, row.name) for row in missing)
        print(
            f"without files are bundles {labels}: add each one again with 'fleet bundle add DIR', "
            "or remove it with 'fleet bundle remove BUNDLE'"
        )


def _next_command(home: FleetHome) -> str:
    """Return the command that brings a restored fleet back."""
    if Path(home.config.bundle).is_dir():
        return "fleet up, or fleet server, under the same host name"
    return f"put the model's bundle into {home.config.bundle}; then fleet up, or fleet server"
