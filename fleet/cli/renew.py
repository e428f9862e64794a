"""`fleet renew`: another certificate for an identity, even if the last one has expired."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from fleet.cli.access import fleet_access, is_remote, own_home
from fleet.cli.enroll import (
    IssuedFolder,
    NameArgument,
    SharedSubscriptionsOption,
    TtlOption,
    check_has_folder,
    check_shares_subscriptions,
    issued_text,
)
from fleet.cli.options import HomeOption, JsonOption, parse_ttl, print_json
from fleet.identity.identity import IDENTITY_FILE, Identity, check_identity_folder
from fleet.operator_api.identity_operations import (
    INVITE,
    MAX_TTL_S,
    SHOW_IDENTITY,
    IdentityKey,
    Invitation,
    InvitationOrder,
)
from fleet.protocol.access import Role
from fleet.registry.results import IdentityRow
from fleet.server.home import FleetHome
from fleet.utils.path_options import path_option
from fleet.utils.paths import absolute_path

OutOption = Annotated[
    Path | None,
    path_option(help="Renew the identity in this folder, with a new key, instead of a token."),
]


def renew_identity(
    name: NameArgument,
    out: OutOption = None,
    ttl: TtlOption = "15m",
    shared_subscriptions: SharedSubscriptionsOption = False,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Renew an identity, which keeps its group, tags and rights: print a token, or use --out."""
    issued: Invitation | IssuedFolder
    with fleet_access(folder) as access:
        row = access.call(SHOW_IDENTITY, IdentityKey(name=name))
        if shared_subscriptions:
            check_shares_subscriptions(row.name, row.role)
            check_has_folder(out)
        out = out or _own_identity(folder, name)
        if out is None:
            order = InvitationOrder(name=name, ttl_s=parse_ttl(ttl, MAX_TTL_S))
            issued = access.call(INVITE, order)
    if out is not None:
        home = own_home(folder, "renew --out")
        out = absolute_path(out)
        home.certify_again(_identity_in(home, row, out, shared_subscriptions=shared_subscriptions))
        issued = IssuedFolder(row.name, row.role, str(out))
    if as_json:
        print_json(issued)
    else:
        print(issued_text(issued).replace("enrolled", "renewed", 1))


def _own_identity(folder: Path | None, name: str) -> Path | None:
    """The folder of an identity that is the fleet's own; None for another one."""
    if is_remote():
        return None
    home = FleetHome.load(folder)
    return home.folder / "identities" / name if home.has_identity(name) else None


def _identity_in(
    home: FleetHome, row: IdentityRow, out: Path, *, shared_subscriptions: bool
) -> Identity:
    """The identity in `out`, or a new one for a folder that has none.

    A worker shares its subscriptions if that is given, or if the fleet's own workers do.
    """
    check_identity_folder(out, row.name)
    role = Role(row.role)
    if (out / IDENTITY_FILE).exists():
        identity = Identity.load(out)
        shares = shared_subscriptions or identity.config.shared_subscriptions
    else:
        identity = Identity(out, home.address().identity_config(row.name, role))
        shares = role is Role.WORKER and (shared_subscriptions or home.shares_subscriptions())
    config = msgspec.structs.replace(identity.config, shared_subscriptions=shares)
    return Identity(out, config)
