"""`fleet enroll`, `suspend`, `resume` and `revoke`: the identities of the fleet."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from msgspec import Struct

from fleet.cli.options import HomeOption, JsonOption, format_time, parse_ttl, print_json
from fleet.errors import ConfigError
from fleet.identity.enrolment import (
    Enrolment,
    check_enrolments,
    parse_role,
    parse_tags,
    read_enrolments,
)
from fleet.protocol.access import Role
from fleet.protocol.enrolment_api import EnrolmentToken
from fleet.protocol.types import DAY_S
from fleet.registry.results import NewToken
from fleet.server.home import FleetHome, check_own_names
from fleet.utils.paths import absolute_path

if TYPE_CHECKING:
    from fleet.registry.store import Registry

MAX_TTL_S: Final = 30 * DAY_S
NAME_HELP: Final = "a-z, 0-9, '-' and '_'."

NameArgument = Annotated[str, typer.Argument(help=NAME_HELP)]
OptionalNameArgument = Annotated[str | None, typer.Argument(help=NAME_HELP)]
OutOption = Annotated[
    Path | None,
    typer.Option(help="Write the identity folder there, with its key, instead of a token."),
]
RoleOption = Annotated[str, typer.Option(help=f"One of {', '.join(Role)}.")]
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
    typer.Option("--from", help="CSV: name, group, tags, role, allow. With --out a folder each."),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Replace an identity; its certificates are revoked.")
]
IdentityBundleOption = Annotated[
    Path | None, typer.Option(help="With --out: the model bundle (default: the fleet's).")
]
SharedSubscriptionsOption = Annotated[
    bool,
    typer.Option(
        "--shared-subscriptions",
        help="For a worker at an MQTT 5 broker that delivers each session to one of several.",
    ),
]


class Invitation(Struct, frozen=True, kw_only=True):
    """A token as `--json` shows it.

    `command` is to be run on the device; `expires_at` is in seconds since 1970.
    """

    name: str
    role: str
    token: str
    expires_at: float
    command: str

    @classmethod
    def of(
        cls, name: str, role: str, new_token: NewToken, *, ca_sha256: str, server: str
    ) -> Invitation:
        """Return a token of the fleet whose CA certificate and service these are."""
        token = str(EnrolmentToken(ca_sha256, new_token.id, new_token.secret))
        return cls(
            name=name,
            role=role,
            token=token,
            expires_at=new_token.expires_at,
            command=shlex.join(["edge-agent", "join", token, "--server", server]),
        )

    @property
    def line(self) -> str:
        until = format_time(self.expires_at)
        return (
            f"enrolled {self.role} {self.name}; run this there, once, before {until}:\n"
            f"  {self.command}"
        )


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
        return f"enrolled {self.role} {self.name} in {self.folder}; next: {next_step}"


def enroll_identities(
    name: OptionalNameArgument = None,
    out: OutOption = None,
    role: RoleOption = Role.DEVICE,
    allow: AllowOption = None,
    group: DeviceGroupOption = None,
    tag: DeviceTagOption = None,
    ttl: TtlOption = "15m",
    from_file: FromFileOption = None,
    force: ForceOption = False,
    bundle: IdentityBundleOption = None,
    shared_subscriptions: SharedSubscriptionsOption = False,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Enrol an identity: print a token for `edge-agent join`, or write a folder (--out)."""
    if (name is None) == (from_file is None):
        raise ConfigError("expected a NAME or --from FILE; give one of the two")
    if name is None and (role != Role.DEVICE or allow or group or tag):
        raise ConfigError(
            "the file has role, group, tags and targets; "
            "leave --role, --group, --tag and --allow out"
        )
    enrolments = (
        read_enrolments(from_file)
        if from_file
        else [_enrolment(name or "", role, group, tag, allow)]
    )
    if shared_subscriptions:
        _check_workers(enrolments)
    if out is None and (bundle or shared_subscriptions):
        raise ConfigError(
            "--bundle and --shared-subscriptions are for an identity folder; give --out DIR, too"
        )
    home = FleetHome.load(folder)
    issued: Sequence[Invitation | IssuedFolder]
    if out is None:
        issued = invite(home, enrolments, parse_ttl(ttl, MAX_TTL_S), force=force)
    else:
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
        print("\n".join(each.line for each in issued))


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


def _check_workers(enrolments: Sequence[Enrolment]) -> None:
    for enrolment in enrolments:
        if enrolment.role is not Role.WORKER:
            name = enrolment.name
            raise ConfigError(
                f"only a worker shares a subscription; {name!r} is none: leave the option out"
            )


def suspend_identity(
    name: NameArgument, folder: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Withdraw an identity's rights until it is resumed."""
    change_state(name, lambda registry: registry.identities.suspend(name), folder, as_json=as_json)


def resume_identity(
    name: NameArgument, folder: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Restore the rights of a suspended identity."""
    change_state(name, lambda registry: registry.identities.resume(name), folder, as_json=as_json)


def revoke_identity(
    name: NameArgument, folder: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Withdraw an identity's rights for good, and revoke its certificates."""
    change_state(name, lambda registry: registry.identities.revoke(name), folder, as_json=as_json)


def change_state(
    name: str, work: Callable[[Registry], None], folder: Path | None, *, as_json: bool
) -> None:
    """Change the state of an identity and print the new one.

    Raises:
        UnknownDeviceError: `name` is not enrolled.
        StateError: the change is not legal.
    """
    with FleetHome.load(folder).registry() as registry:
        work(registry)
        (row,) = (row for row in registry.identities.all() if row.name == name)
    if as_json:
        print_json(row)
    else:
        print(f"{row.role} {name} is {row.state}")


def invite(
    home: FleetHome, enrolments: Sequence[Enrolment], ttl_s: float, *, force: bool
) -> list[Invitation]:
    """Enrol all or none; a token for each.

    Raises:
        ConfigError: the fleet has no service to join at.
        IdentityError: one of them cannot be enrolled.
    """
    check_own_names(enrolments)
    server = service_address(home)
    with home.registry() as registry:
        tokens = registry.identities.enroll(enrolments, ttl_s, replace=force)
    ca_sha256 = home.ca_sha256()
    return [
        Invitation.of(each.name, each.role, token, ca_sha256=ca_sha256, server=server)
        for each, token in zip(enrolments, tokens, strict=True)
    ]


def service_address(home: FleetHome) -> str:
    """The URL at which identities join. Raises ConfigError when the fleet has no service."""
    server = home.address().server
    if server is None:
        raise ConfigError(
            "this fleet has no service to join at; give --out DIR, or start it with --service-port"
        )
    return server
