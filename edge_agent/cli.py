"""The command `edge-agent`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from edge_agent.device_unit import DEVICE_SERVICE, device_unit
from fleet.bundles.manifest import EDGE_SIDES, Bundle, Manifest
from fleet.errors import FleetError
from fleet.identity.identity import Identity, IdentityConfig
from fleet.planning.machine_speeds import print_progress, report_speeds, warn_about_load
from fleet.protocol.access import Role
from fleet.utils.cli_runtime import run_command, stop_event, wait_stopped
from fleet.utils.command_group import CommandGroup
from fleet.utils.console import new_console
from fleet.utils.host_address import host_port
from fleet.utils.optional_imports import needs
from fleet.utils.path_options import path_argument, path_option
from fleet.utils.paths import absolute_path
from fleet.utils.printable import print_line
from fleet.utils.service_manager import READY, Watchdog, notify
from fleet.utils.systemd_unit import service_user, write_units
from fleet.utils.text_files import decode_text
from fleet.utils.version_option import VersionOption

if TYPE_CHECKING:
    from edge_agent.serving.agent import Agent
    from fleet.http_api.api_server import ApiServer

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


ApiOption = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Serve the HTTP APIs of OpenAI and Ollama here, also without a broker.",
    ),
]
ApiKeyFileOption = Annotated[
    Path | None, path_option(help="File of the keys of the API, one in each line.")
]


@app.callback()
def _edge_agent(version: VersionOption = False) -> None:
    """Run a device of the fleet, which answers prompts with the lower half of a language model."""


@app.command("run")
def run_agent(
    folder: Annotated[
        Path, path_argument(help="Identity folder, made by 'fleet enroll NAME --out DIR'.")
    ],
    bundle: Annotated[
        Path | None, path_option(help="Model bundle; default: the identity's bundle.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=256, help="Threads of ONNX Runtime.")
    ] = None,
    api: ApiOption = None,
    api_key_file: ApiKeyFileOption = None,
) -> None:
    """Serve prompts until stopped."""
    with needs("edge"):
        from edge_agent.update.launcher import launch, restart, software_store, stop_with_launcher

    launch(folder)
    with needs("edge"):
        from edge_agent.config import AgentConfig
        from edge_agent.serving.agent import Agent
        from edge_agent.update.download import fetch_bundle
        from edge_agent.update.software_install import install_software
        from edge_agent.update.supervisor import Supervisor
        from fleet.identity.certificate_renewer import CertificateRenewer
        from fleet.protocol import topics
        from fleet.transport.base import Will
        from fleet.transport.mqtt import MqttTransport

    identity = Identity.load(folder)
    identity.check_role(Role.DEVICE, "make one with 'fleet enroll NAME --out DIR'")
    config = AgentConfig.load(folder)
    if threads:
        config = msgspec.structs.replace(config, num_threads=threads)

    base = bundle or identity.bundle
    supervisor = Supervisor(
        folder,
        config,
        base,
        partial(fetch_bundle, identity),
        partial(_print_serving, identity.name),
        install=partial(install_software, identity, software_store(folder)),
    )
    server = _api_server(lambda: supervisor.agent, api, api_key_file) if api else None
    stop = stop_event()
    stop_with_launcher(stop)
    supervisor.prepare(stop)
    will = Will(topics.device_status(identity.name), Agent.will())
    with (
        MqttTransport.connect(identity, will=will, wait=False) as transport,
        CertificateRenewer(identity, transport.reload_certificate),
        server or nullcontext(),
    ):
        if server:
            print_line(f"device {identity.name} has its HTTP API at {server.url}")
        if server or transport.wait_up(stop):
            supervisor.on_cycle = Watchdog().watch("supervisor")
            supervisor.run(transport)
    if supervisor.is_replaced:
        restart()


@app.command("serve")
def serve_command(
    bundle: Annotated[Path, path_argument(help="Folder of a model bundle.")],
    api: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Address of the HTTP API.")
    ] = "127.0.0.1:11434",
    api_key_file: ApiKeyFileOption = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=256, help="Threads of ONNX Runtime.")
    ] = None,
) -> None:
    """Answer the clients of OpenAI and Ollama with a bundle alone, without a fleet."""
    with needs("edge"):
        from edge_agent.config import AgentConfig
        from edge_agent.local_api.lone_agent import lone_agent

    opened = Bundle.load(bundle, EDGE_SIDES)
    server = _api_server(lambda: agent, api, api_key_file)
    config = AgentConfig(num_threads=threads) if threads else AgentConfig()
    with lone_agent(opened, config) as agent, server:
        stop = stop_event()
        print_line(f"bundle {opened.manifest.bundle_id} has its HTTP API at {server.url}")
        wait_stopped(stop)


def _api_server(
    find_agent: Callable[[], Agent | None], address: str, key_file: Path | None
) -> ApiServer:
    """Return the server of the HTTP API."""
    with needs("api"):
        from fleet.http_api.api_server import ApiServer
    from edge_agent.local_api.api_keys import ApiKeys, check_exposure
    from edge_agent.local_api.device_backend import DeviceBackend
    from fleet.http_api.api_address import ApiAddress

    listens = ApiAddress.parse(address)
    keys = ApiKeys.load(key_file) if key_file else ApiKeys()
    check_exposure(listens, has_keys=bool(keys))
    return ApiServer(listens, DeviceBackend(find_agent, keys))


@app.command("systemd")
def systemd_command(
    folder: Annotated[Path, path_argument(help="Identity folder of the device.")],
    out: Annotated[Path, path_option(help="Folder of the unit.")] = Path("/etc/systemd/system"),
    user: Annotated[
        str | None, typer.Option(help="User that runs it (default: the owner of the folder).")
    ] = None,
    api: ApiOption = None,
    api_key_file: ApiKeyFileOption = None,
) -> None:
    """Write a hardened systemd unit that runs this device."""
    identity = absolute_path(folder)
    unit = device_unit(identity, service_user(identity, user), api, api_key_file)
    write_units(out, {DEVICE_SERVICE: unit})
    print_line(
        f"wrote {out / DEVICE_SERVICE}; "
        f"next: systemctl daemon-reload && systemctl enable --now {DEVICE_SERVICE}"
    )


@app.command("join")
def join_command(
    token: Annotated[
        str, typer.Argument(help="Token, printed by 'fleet enroll NAME'; '-' reads it from stdin.")
    ],
    server: Annotated[str, typer.Option(help="The fleet's service, https://HOST:PORT.")],
    out: Annotated[
        Path, path_option(help="Identity folder to create, or to repair with a new token.")
    ] = Path("device"),
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Join a fleet: make a key, request its certificate, and fetch the model."""
    with needs("edge"):
        import edge_agent.update.supervisor  # noqa: F401 (fails before the token is used up)
        from edge_agent.provisioning.join import join_fleet
        from edge_agent.state.bundle_slots import SlotStore
        from fleet.protocol.enrolment_api import EnrolmentToken

    if token == "-":
        token = decode_text(sys.stdin.buffer.readline(), "the token on stdin")
    enrolment_token = EnrolmentToken.parse(token)
    identity = join_fleet(enrolment_token, server, out)
    bundle_id = SlotStore(out).load().current
    if bundle_id:
        _fetch_first_bundle(identity, bundle_id)
    if as_json:
        _print_joined(identity.config, out, bundle_id)
    elif identity.config.role is Role.DEVICE:
        print_line(f"{identity.name} has joined; start it with: {_run_line(out)}")
    else:
        print_line(
            f"{identity.name} has joined as {identity.config.role}; its identity is in {out}"
        )


@app.command("measure")
def measure_speed(
    bundle: Annotated[Path, path_argument(help="Folder of a model bundle.")],
    out: Annotated[
        Path, path_option(help="File of the speeds, for 'fleet plan --machine'.")
    ] = Path("device.json"),
    threads: Annotated[
        int | None, typer.Option(min=1, max=256, help="Threads of ONNX Runtime.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and write no file.")] = False,
) -> None:
    """Measure this device's speed with a model, in less than a minute."""
    with needs("edge"):
        from edge_agent.config import AgentConfig
        from edge_agent.engine.speed import measure_device
        from fleet.graphs.ort_runtime import check_instruction_set
        from fleet.graphs.partition import Partition

    warn_about_load()
    opened = Bundle.load(bundle, ("edge",))
    check_instruction_set(opened.manifest)
    num_threads = threads or AgentConfig().num_threads
    partition = Partition(opened, num_threads)
    report_speeds(measure_device(partition, num_threads, print_progress), out, as_json=as_json)


@app.command("renew")
def renew_command(
    folder: Annotated[Path, path_argument(help="Identity folder of any role.")],
    at_once: Annotated[
        bool, typer.Option("--now", help="Renew also before two thirds of the life are over.")
    ] = False,
) -> None:
    """Renew the certificate of an app or of a device that does not run; for a daily timer."""
    with needs("edge"):
        from fleet.identity.certificate_renewer import renew_if_due

    identity = Identity.load(folder)
    is_renewed = renew_if_due(identity, at_once=at_once)
    print_line(f"{identity.name} is renewed" if is_renewed else f"{identity.name} is not due yet")


@app.command("address")
def address_command(
    folder: Annotated[Path, path_argument(help="Identity folder.")],
    host: Annotated[str, typer.Option(help="New host of the broker.")],
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="New port of it.")] = None,
    server: Annotated[
        str | None, typer.Option(help="New address of the service (default: on HOST).")
    ] = None,
) -> None:
    """Change the server's address of an identity; a device that runs has to be started again."""
    with needs("edge"):
        from edge_agent.provisioning.address import change_address

    identity = change_address(Identity.load(folder), host, port, server)
    config = identity.config
    service = f", service at {config.server}" if config.server else ""
    broker = host_port(config.host, config.port)
    print_line(f"{identity.name} connects to the broker on {broker}{service}")


def _run_line(folder: Path) -> str:
    """The command that runs a device, ready to be pasted into a shell."""
    return shlex.join(["edge-agent", "run", str(folder)])


def _fetch_first_bundle(identity: Identity, bundle_id: str) -> None:
    from edge_agent.update.download import FETCH_S, fetch_bundle
    from fleet.identity.service_client import log_wait, retry_while_away

    stop = stop_event()
    try:
        with _progress_bar(f"bundle {bundle_id}") as on_progress:
            retry_while_away(
                lambda: fetch_bundle(identity, bundle_id, stop, on_progress),
                timeout_s=FETCH_S,
                stop=stop,
                on_wait=log_wait,
            )
    except FleetError as error:
        raise type(error)(
            f"{identity.name} has joined, but its bundle is missing: {error}; "
            f"this fetches it: {_run_line(identity.folder)}"
        ) from None


@contextmanager
def _progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar of received and total bytes on stderr, if that is a terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = new_console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda received, total: bar.update(task, completed=received, total=total)


def _print_serving(device: str, manifest: Manifest) -> None:
    exits = ", ".join(map(str, manifest.exits))
    print(
        f"device {device} serves {manifest.model.name}, bundle {manifest.bundle_id}, exits {exits}",
        flush=True,
    )
    notify(READY)


def _print_joined(config: IdentityConfig, folder: Path, bundle_id: str | None) -> None:
    fields = {"folder": str(folder), "bundle_id": bundle_id, **msgspec.to_builtins(config)}
    print(json.dumps(fields))


def main() -> None:
    """Run the command line."""
    run_command("edge-agent", app)
