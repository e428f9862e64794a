"""`fleet enroll`, `suspend`, `resume` and `revoke`: the identities of the fleet."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
from msgspec import Struct

from fleet.cli.access import call_fleet, fleet_access, own_home
from fleet.cli.options import (
    HomeOption,
    JsonOption,
    checked_name,
    format_time,
    parse_ttl,
    print_json,
)
from fleet.errors import ConfigError, UnknownDeviceError
from fleet.identity.enrolment import (
    Enrolment,
    check_enrolments,
    parse_role,
    parse_tags,
    read_enrolments,
)
from fleet.operator_api.fleet_access import FleetAccess
from fleet.operator_api.identity_operations import (
    ENROLL,
    LIST_IDENTITIES,
    MAX_TTL_S,
    RESUME,
    REVOKE,
    SHOW_IDENTITY,
    SUSPEND,
    EnrolmentOrder,
    IdentityKey,
    IdentityQuery,
    Invitation,
)
from fleet.operator_api.operation import Operation
from fleet.operator_api.paging import MAX_PAGE, walk_pages
from fleet.protocol.access import Role
from fleet.registry.identities.lifecycle import LIMITED_BY_CERTIFICATE
from fleet.registry.results import IdentityRow
from fleet.utils.path_options import path_option
from fleet.utils.paths import absolute_path
from fleet.utils.printable import print_line, printable_line

NAME_HELP: Final = "a-z, 0-9, '-' and '_'."

NameArgument = Annotated[str, typer.Argument(help=NAME_HELP, callback=checked_name)]
OptionalNameArgument = Annotated[str | None, typer.Argument(help=NAME_HELP, callback=checked_name)]
OutOption = Annotated[
    Path | None,
    path_option(help="Write the identity folder there, with its key, instead of a token."),
]
RoleOption = Annotated[
    str | None,
    typer.Option(help=f"One of {', '.join(Role)} (default: device; with --force its role)."),
]
AllowOption = Annotated[
    list[str] | None, typer.Option(help="Device or group that an app may prompt; repeatable.")
]
DeviceGroupOption = Annotated[str | None, typer.Option(help="Group of a device.")]
DeviceTagOption = Annotated[
    list[str] | None, typer.Option(help="Tag of a device, key=value; repeatable.")
]
TtlOption = Annotated[str, typer.Option(help="Lifetime of the token: 15m, 24h, 7d.")]
FromFileOption = Annotated[
    Path | None,
    path_option("--from", help="CSV: name, group, tags, role, allow. With --out a folder each."),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Replace an identity; its certificates are revoked.")
]
NewOnlyOption = Annotated[
    bool, typer.Option("--new-only", help="With --from: leave out names that are enrolled.")
]
IdentityBundleOption = Annotated[
    Path | None, path_option(help="With --out: the model bundle (default: the fleet's).")
]
SharedSubscriptionsOption = Annotated[
    bool,
    typer.Option(
        "--shared-subscriptions",
        help="For a worker at an MQTT 5 broker that delivers each session to one of several.",
    ),
]


class IssuedFolder(Struct, frozen=True):
    """An identity folder as `--json` shows it."""

    name: str
    role: str
    folder: str

    @property
    def line(self) -> str:
        next_step = "use ca.pem, cert.pem and key.pem"
        if self.role == Role.DEVICE:
            next_step = shlex.join(["edge-agent", "run", self.folder])
        line = f"enrolled {self.role} {self.name} in {self.folder}; next: {next_step}"
        return printable_line(line)


def enroll_identities(
    name: OptionalNameArgument = None,
    out: OutOption = None,
    role: RoleOption = None,
    allow: AllowOption = None,
    group: DeviceGroupOption = None,
    tag: DeviceTagOption = None,
    ttl: TtlOption = "15m",
    from_file: FromFileOption = None,
    force: ForceOption = False,
    new_only: NewOnlyOption = False,
    bundle: IdentityBundleOption = None,
    shared_subscriptions: SharedSubscriptionsOption = False,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Enrol an identity: print a token for `edge-agent join`, or write a folder (--out)."""
    if (name is None) == (from_file is None):
        raise ConfigError("expected a NAME or --from FILE; give one of the two")
    if new_only and (force or from_file is None):
        raise ConfigError("--new-only is for --from FILE, without --force; leave one of them out")
    if name is None and (role not in (None, Role.DEVICE) or allow or group or tag):
        raise ConfigError(
            "the file has role, group, tags and targets; "
            "leave --role, --group, --tag and --allow out"
        )
    home = None if out is None else own_home(folder, "enroll --out")
    with fleet_access(folder) as access:
        if from_file:
            enrolments = read_enrolments(from_file)
        else:
            name = name or ""
            role = role or (_role_of(access, name) if force else Role.DEVICE)
            enrolments = [_enrolment(name, role, group, tag, allow)]
        if shared_subscriptions:
            for each in enrolments:
                check_shares_subscriptions(each.name, each.role)
        if bundle or shared_subscriptions:
            check_has_folder(out)
        if new_only:
            enrolments = without_enrolled(access, enrolments)
        if out is None:
            issued: Sequence[Invitation | IssuedFolder] = invite(
                access, enrolments, parse_ttl(ttl, MAX_TTL_S), force=force
            )
    if home is not None and out is not None:
        out = absolute_path(out)
        folders = {out / each.name if from_file else out: each for each in enrolments}
        address = home.address(
            bundle and absolute_path(bundle), shared_subscriptions=shared_subscriptions
        )
        home.enroll_all(folders, address, force=force)
        issued = [IssuedFolder(each.name, each.role, str(path)) for path, each in folders.items()]
    if as_json:
        print_json(issued if from_file else issued[0])
    else:
        print("\n".join(map(issued_text, issued)) or f"every name in {from_file} is enrolled")


def issued_text(issued: Invitation | IssuedFolder) -> str:
    """Return a token or an identity folder, with the next step, as text."""
    if isinstance(issued, IssuedFolder):
        return issued.line
    until = format_time(issued.expires_at)
    first = f"enrolled {issued.role} {issued.name}; run this there, once, before {until}:"
    return f"{printable_line(first)}\n  {printable_line(issued.command)}"


def _role_of(access: FleetAccess, name: str) -> str:
    """Return the role of an identity, which it keeps when it is replaced; "device" of a new one."""
    try:
        return access.call(SHOW_IDENTITY, IdentityKey(name=name)).role
    except UnknownDeviceError:
        return Role.DEVICE


def _enrolment(
    name: str, role: str, group: str | None, tags: list[str] | None, allow: list[str] | None
) -> Enrolment:
    enrolment = Enrolment(
        name=name,
        role=parse_role(role),
        group=group,
        tags=parse_tags(tags or ()),
        targets=tuple(dict.fromkeys(allow or ())),
    )
    check_enrolments([enrolment])
    return enrolment


def without_enrolled(access: FleetAccess, enrolments: Sequence[Enrolment]) -> list[Enrolment]:
    """Return the enrolments of names that have no certificate."""
    pages = walk_pages(access, LIST_IDENTITIES, IdentityQuery(limit=MAX_PAGE))
    rows = [row for page in pages for row in page.identities]
    enrolled = {row.name for row in rows if row.state in LIMITED_BY_CERTIFICATE}
    return [each for each in enrolments if each.name not in enrolled]


def check_shares_subscriptions(name: str, role: str) -> None:
    """Raise ConfigError unless the role of `name` shares subscriptions."""
    if role != Role.WORKER:
        raise ConfigError(
            f"only a worker shares a subscription; {name!r} is not a worker: leave the option out"
        )


def check_has_folder(out: Path | None) -> None:
    """Raise ConfigError if options of an identity folder are given without one."""
    if out is None:
        raise ConfigError(
            "--bundle and --shared-subscriptions are for an identity folder; give --out DIR, too"
        )


def suspend_identity(
    name: NameArgument, folder: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Withdraw an identity's rights until it is resumed."""
    change_state(folder, SUSPEND, name, as_json=as_json)


def resume_identity(
    name: NameArgument, folder: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Restore the rights of a suspended identity."""
    change_state(folder, RESUME, name, as_json=as_json)


def revoke_identity(
    name: NameArgument, folder: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Withdraw an identity's rights for good, and revoke its certificates."""
    change_state(folder, REVOKE, name, as_json=as_json)


def change_state(
    folder: Path | None, operation: Operation[IdentityKey, IdentityRow], name: str, *, as_json: bool
) -> None:
    """Change the state of an identity and print the new one.

    Raises:
        UnknownDeviceError: `name` is not enrolled.
        StateError: the change is not legal.
    """
    row = call_fleet(folder, operation, IdentityKey(name=name))
    if as_json:
        print_json(row)
    else:
        print_line(f"{row.role} {name} is {row.state}")


def invite(
    access: FleetAccess, enrolments: Sequence[Enrolment], ttl_s: float, *, force: bool
) -> list[Invitation]:
    """Enrol all or none; a token for each.

    Raises:
        ConfigError: the fleet has no service to join at.
        IdentityError: one of them cannot be enrolled.
    """
    if not enrolments:
        return []
    order = EnrolmentOrder(enrolments=tuple(enrolments), ttl_s=ttl_s, replace=force)
    return access.call(ENROLL, order).invitations
