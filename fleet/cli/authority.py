"""`fleet authority`: rotation of the fleet's certificate authority."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fleet.cli.access import own_home
from fleet.cli.options import HomeOption
from fleet.server.home import FleetHome, ca_passphrase
from fleet.utils.command_group import CommandGroup
from provisioning.authority_rotation import (
    ca_sha256,
    check_retirable,
    not_renewed,
    retire_authority,
    rotate_authority,
)

if TYPE_CHECKING:
    from provisioning.authority import CertificateAuthority

app = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, help="Replace the fleet's certificate authority."
)

ForceOption = Annotated[
    bool, typer.Option("--force", help="Lock out identities that were not renewed.")
]


@app.command("rotate")
def rotate(folder: HomeOption = None) -> None:
    """Make a second authority; the fleet trusts both until the old one is retired."""
    home = own_home(folder, "authority rotate")
    authority = rotate_authority(home.ca_folder, ca_passphrase())
    _record(home, "rotate_authority", authority)
    print(
        "the fleet trusts two authorities now; a running server uses both within seconds, but a "
        "mosquitto has to be started again\n"
        "next, when all identities have renewed themselves ('fleet doctor' counts the others): "
        "fleet authority retire"
    )


@app.command("retire")
def retire(force: ForceOption = False, folder: HomeOption = None) -> None:
    """Remove the old authority; its certificates become invalid."""
    home = own_home(folder, "authority retire")
    home.renew_own()
    authority = home.authority()
    with home.registry() as registry:
        left = not_renewed(authority, registry.identities.newest_certificates())
    check_retirable(authority, [] if force else left)
    stores = (home.bundles, home.software)
    successor = retire_authority(home.ca_folder, stores, ca_passphrase())
    _record(home, "retire_authority", successor)
    print(
        "the old authority is retired; start the server and a mosquitto again, so that they no "
        "longer trust it"
    )


def _record(home: FleetHome, action: str, authority: CertificateAuthority) -> None:
    with home.registry() as registry:
        registry.audit_log.add(action, "authority", ca_sha256=ca_sha256(authority))
