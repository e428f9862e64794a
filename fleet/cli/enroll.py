"""`fleet enroll`, `suspend`, `resume` and `revoke`: who belongs to the fleet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
import typer
from msgspec import Struct

from fleet.cli.stats import DAY_S, JsonOption, StateOption, parse_span
from fleet.errors import ConfigError
from fleet.identity.enrolment import Enrolment, check_all, parse_role, parse_tags, read_enrolments
from fleet.protocol.access import Role
from fleet.protocol.enrolment_api import EnrolmentToken
from fleet.server.home import FleetHome

if TYPE_CHECKING:
    from fleet.registry.store import Registry

MAX_TTL_S: Final = 30 * DAY_S

NameArgument = Annotated[str, typer.Argument(help="a-z, 0-9, '-' and '_'.")]


class Invitation(Struct, frozen=True, kw_only=True):
    """A token as `--json` shows it; `command` is what to run on the device, `expires_at` in seconds since 1970."""

    name: str
    role: str
    token: str
    expires_at: float
    command: str

    @property
    def line(self) -> str:
        until = datetime.fromtimestamp(self.expires_at).astimezone().strftime("%Y-%m-%d %H:%M %Z")
        return f"enrolled {self.role} {self.name}; run this there, once, before {until}:\n  {self.command}"


class Issued(Struct, frozen=True):
    """An identity folder as `--json` shows it."""

    name: str
    role: str
    folder: str

    @property
    def line(self) -> str:
        following = (
            f"edge-agent run {self.folder}"
            if self.role == Role.DEVICE
            else "use ca.pem, cert.pem and key.pem"
        )
        return f"enrolled {self.role} {self.name} in {self.folder}; next: {following}"


def enroll(
    name: Annotated[str | None, typer.Argument(help="a-z, 0-9, '-' and '_'.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the identity folder there, key and all, instead of giving a token."
        ),
    ] = None,
    role: Annotated[str, typer.Option(help="device, app, worker or server.")] = "device",
    allow: Annotated[
        list[str] | None, typer.Option(help="Device or group that an app may prompt; repeatable.")
    ] = None,
    group: Annotated[str | None, typer.Option(help="Group of a device.")] = None,
    tag: Annotated[
        list[str] | None, typer.Option(help="Tag of a device, key=value; repeatable.")
    ] = None,
    ttl: Annotated[str, typer.Option(help="How long the token is good for: 15m, 24h, 7d.")] = "15m",
    from_file: Annotated[
        Path | None,
        typer.Option(
            "--from", help="CSV: name, group, tags, role, allow. With --out a folder each."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an identity; its certificates are revoked.")
    ] = False,
    bundle: Annotated[
        Path | None, typer.Option(help="With --out: the model bundle (default: the fleet's).")
    ] = None,
    shared_subscriptions: Annotated[
        bool,
        typer.Option(
            "--shared-subscriptions",
            help="A worker's broker has them (MQTT 5): one takes a session.",
        ),
    ] = False,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Enrol a device, app or worker: a one-time token for `edge-agent join`, or with --out a ready folder."""
    if (name is None) == (from_file is None):
        raise ConfigError("expected a NAME or --from FILE; give one of the two")
    if from_file and (role != Role.DEVICE or allow or group or tag):
        raise ConfigError(
            "the file says role, group, tags and targets; leave --role, --group, --tag and --allow out"
        )
    if from_file:
        wanted = read_enrolments(from_file)
    else:
        targets = tuple(dict.fromkeys(allow or ()))
        wanted = [
            Enrolment(
                name=name or "",
                role=parse_role(role),
                group=group,
                tags=parse_tags(tag or ()),
                targets=targets,
            )
        ]
        check_all(wanted)
    if shared_subscriptions and any(each.role is not Role.WORKER for each in wanted):
        raise ConfigError(
            f"only a worker shares a subscription; {wanted[0].name!r} is none: leave the option out"
        )
    fleet = FleetHome.load(state or FleetHome.default_folder())
    made: Sequence[Invitation | Issued]
    if out is None:
        if bundle or shared_subscriptions:
            raise ConfigError(
                "--bundle and --shared-subscriptions are for an identity folder; give --out DIR, too"
            )
        made = invite(fleet, wanted, parse_ttl(ttl), force=force)
    else:
        folders = {(out / each.name if from_file else out).resolve(): each for each in wanted}
        site = fleet.site(bundle and bundle.resolve(), shared_subscriptions=shared_subscriptions)
        fleet.enroll_all(folders, site, force=force)
        made = [Issued(each.name, each.role, str(folder)) for folder, each in folders.items()]
    if as_json:
        print(msgspec.json.encode(made if from_file else made[0]).decode())
    else:
        print("\n".join(each.line for each in made))


def suspend(name: NameArgument, state: StateOption = None, as_json: JsonOption = False) -> None:
    """Take an identity's rights away until it is resumed."""
    change(name, lambda registry: registry.suspend(name), state, as_json=as_json)


def resume(name: NameArgument, state: StateOption = None, as_json: JsonOption = False) -> None:
    """Give a suspended identity its rights back."""
    change(name, lambda registry: registry.resume(name), state, as_json=as_json)


def revoke(name: NameArgument, state: StateOption = None, as_json: JsonOption = False) -> None:
    """Take an identity's rights away for good, and revoke its certificates."""
    change(name, lambda registry: registry.revoke(name), state, as_json=as_json)


def change(
    name: str, work: Callable[[Registry], None], state: Path | None, *, as_json: bool
) -> None:
    """Changes a state, and shows what it has become.

    Raises:
        UnknownDeviceError: nobody enrolled `name`.
        StateError: the change is not legal.
    """
    with FleetHome.load(state or FleetHome.default_folder()).registry() as registry:
        work(registry)
        (row,) = (row for row in registry.identities() if row.name == name)
    print(msgspec.json.encode(row).decode() if as_json else f"{row.role} {name} is {row.state}")


def invite(
    fleet: FleetHome, wanted: Sequence[Enrolment], ttl_s: float, *, force: bool
) -> list[Invitation]:
    """Enrols all or none; a token for each.

    Raises:
        ConfigError: the fleet has no service to join at.
        IdentityError: one of them cannot be enrolled.
    """
    server = fleet.site().server
    if server is None:
        raise ConfigError(
            "this fleet has no service to join at; give --out DIR, or start it with --service-port"
        )
    with fleet.registry() as registry:
        tokens = registry.enroll(wanted, ttl_s, replace=force)
    ca_sha256 = fleet.ca_sha256()
    invitations = []
    for each, made in zip(wanted, tokens, strict=True):
        token = str(EnrolmentToken(ca_sha256, made.id, made.secret))
        command = f"edge-agent join {token} --server {server}"
        invitations.append(
            Invitation(
                name=each.name,
                role=each.role,
                token=token,
                expires_at=made.expires_at,
                command=command,
            )
        )
    return invitations


def parse_ttl(value: str) -> float:
    """Seconds; raises ConfigError for anything but a span of 1 s to 30 days."""
    span_s = parse_span(value)
    if span_s is None or not 1 <= span_s <= MAX_TTL_S:
        raise ConfigError(f"ttl {value!r}: expected a span like 15m, 24h or 7d, at most 30d")
    return span_s
