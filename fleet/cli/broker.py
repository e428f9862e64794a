"""`fleet broker`: files for a mosquitto that serves this fleet, and the same rights for other brokers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fleet.cli.stats import StateOption
from fleet.errors import ConfigError
from fleet.protocol.access import Action, Grants, Role
from fleet.server.child_process import Child
from fleet.server.home import MOSQUITTO, FleetHome
from fleet.utils.optional_imports import load

if TYPE_CHECKING:
    from fleet.registry.store import Registry

app = typer.Typer(no_args_is_help=True, help="Brokers other than the embedded one.")

FORMATS: Final = ("mosquitto", "emqx", "json")
README: Final = """\
A mosquitto for the fleet in {state}, on port {port}. Start it:

    mosquitto -c {config}

or from a systemd unit with that ExecStart, Type=exec, Restart=on-failure and ExecReload=/bin/kill -HUP $MAINPID.
It needs mosquitto 2.0.11 or later, and runs as the user who wrote these files.

While a fleet server keeps these files in step with the registry, nothing is to be done after a change:

    fleet server --no-broker --mosquitto {folder}

(with --reload 'systemctl reload NAME' where it may not send signals to mosquitto). Without one, run this after every
enrol, suspend, resume and revoke, and at least once in {crl_days} days, since an expired list lets nobody in:

    fleet broker config --out {folder} && kill -HUP "$(cat {pid_file})"

A connection that is open then stays open, without rights where its name was revoked. The broker's certificate lives
{leaf_days} days; the same command makes a new one.
"""

FormatOption = Annotated[str, typer.Option("--format", help="mosquitto, emqx or json.")]


@app.command("config")
def config(
    out: Annotated[
        Path, typer.Option(help="Folder for the files; it holds the broker's private key.")
    ],
    host: Annotated[
        str | None, typer.Option(help="Address to listen on (default: the fleet's).")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="(default: the fleet's).")
    ] = None,
    state: StateOption = None,
) -> None:
    """Write mosquitto.conf, acl, crl.pem and certificates into a folder, with a README; again after changes."""
    fleet = FleetHome.load(state or FleetHome.default_folder())
    with fleet.registry() as registry:
        path = write_mosquitto(fleet, registry, out.resolve(), host, port)
    print(
        f"wrote {path} with rights, revocation list and certificates; next: mosquitto -c {path}, see README there"
    )


@app.command("rules")
def rules(form: FormatOption = "mosquitto", state: StateOption = None) -> None:
    """Print what everybody who is active may publish and subscribe, for a broker's ACL."""
    if form not in FORMATS:
        raise ConfigError(f"--format {form}: expected one of {', '.join(FORMATS)}")
    with FleetHome.load(state or FleetHome.default_folder()).registry() as registry:
        print(format_rules(registry.all_grants(), form), end="")


def format_rules(grants: list[Grants], form: str) -> str:
    """The rights of everybody in a broker's words: one of `FORMATS`."""
    if form == "mosquitto":
        text: str = load("cloud_broker_worker.broker.mosquitto").acl_text(grants)
        return text
    if form == "emqx":
        lines = [
            f"{{allow, {{username, {json.dumps(each.name)}}}, {action}, {json.dumps(each.filters[action])}}}."
            for each in grants
            for action in Action
        ]
        return "".join(f"{line}\n" for line in (*lines, "{deny, all}."))
    rights = [{"name": each.name, "role": each.role} | dict(each.filters) for each in grants]
    return json.dumps(rights, indent=2) + "\n"


def write_mosquitto(
    fleet: FleetHome,
    registry: Registry,
    folder: Path,
    host: str | None = None,
    port: int | None = None,
) -> Path:
    """Writes everything that a mosquitto for `fleet` reads into `folder`; gives the path of its `mosquitto.conf`.

    Raises:
        ConfigError: the folder cannot be written.
        IdentityError: there is no certificate authority.
    """
    mosquitto = load("cloud_broker_worker.broker.mosquitto")
    crl = load("provisioning.crl")
    signer = fleet.authority()
    leaf_days = load("provisioning.authority").LEAF_DAYS
    tls = fleet.server_tls(folder)
    path: Path = mosquitto.write_config(
        folder,
        port or fleet.config.port,
        tls,
        registry.all_grants(),
        host or fleet.config.host,
        has_crl=True,
    )
    crl.CrlFile(folder / mosquitto.CRL_FILE, signer).update(
        registry.revoked_certificates(), time.time()
    )
    (folder / "README").write_text(
        README.format(
            state=fleet.folder,
            port=port or fleet.config.port,
            config=path,
            folder=folder,
            pid_file=folder / mosquitto.PID_FILE,
            crl_days=crl.CRL_DAYS,
            leaf_days=leaf_days,
        )
    )
    return path


def start_mosquitto(fleet: FleetHome, folder: Path) -> Child:
    """A mosquitto for `fleet` on its port, which listens already; `folder` is where its files are.

    Raises:
        ConfigError: it is not installed, or the folder cannot be written.
        FleetError: it did not start.
    """
    program = load("cloud_broker_worker.broker.mosquitto").find_mosquitto()
    fleet.identity(
        "operator-1", Role.SERVER
    )  # so that a first `fleet prompt` finds its rights there
    with fleet.registry() as registry:
        path = write_mosquitto(fleet, registry, folder)
    process = Child(MOSQUITTO, ("-c", str(path)), (program,))
    try:
        process.wait_listening(fleet.config.host, fleet.config.port)
    except BaseException:
        process.stop()
        raise
    return process


def mosquitto_reload(folder: Path, command: str | None) -> Callable[[], None]:
    """What makes the mosquitto of `folder` read its files again: a command, or SIGHUP when it is None."""
    how = load("cloud_broker_worker.broker.mosquitto_reload")
    pid_file = folder / load("cloud_broker_worker.broker.mosquitto").PID_FILE
    reload: Callable[[], None] = how.by_command(command) if command else how.by_signal(pid_file)
    return reload


def mosquitto_keeper(
    fleet: FleetHome, registry: Registry, folder: Path, reload: Callable[[], None]
) -> Any:
    """What keeps the files in `folder` equal to the registry.

    Raises:
        ConfigError: `write_mosquitto` has not been there.
        IdentityError: there is no certificate authority.
    """
    mosquitto = load("cloud_broker_worker.broker.mosquitto")
    if not (folder / mosquitto.CONFIG_FILE).exists():
        raise ConfigError(
            f"no {mosquitto.CONFIG_FILE} in {folder}; make it: fleet broker config --out {folder}"
        )
    signer = fleet.authority()
    return load("cloud_broker_worker.broker.mosquitto_sync").MosquittoSync(
        folder,
        registry,
        load("provisioning.crl").CrlFile(folder / mosquitto.CRL_FILE, signer),
        reload,
        load("provisioning.session_takeover").SessionTakeover(
            signer, fleet.config.host, fleet.config.port
        ),
    )
