"""The command `edge-agent`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from fleet.bundles.manifest import Manifest
from fleet.errors import ConfigError, FleetError
from fleet.identity.identity import Identity, IdentityConfig
from fleet.protocol.access import Role
from fleet.utils.cli_runtime import run_command, stop_event
from fleet.utils.optional_imports import needs

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)


@app.callback()
def _edge_agent() -> None:
    """Run a device of the fleet, which answers prompts with the lower half of a language model."""


@app.command("run")
def run_agent(
    folder: Annotated[
        Path, typer.Argument(help="Identity folder, made by 'fleet enroll NAME --out DIR'.")
    ],
    bundle: Annotated[
        Path | None, typer.Option(help="Model bundle; default: the identity's bundle.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of ONNX Runtime.")] = None,
) -> None:
    """Serve prompts until stopped."""
    with needs("edge"):
        from edge_agent.config import AgentConfig
        from edge_agent.provisioning.certificate_renewer import CertificateRenewer
        from edge_agent.serving.agent import Agent
        from edge_agent.update.download import fetch_bundle
        from edge_agent.update.supervisor import Supervisor
        from fleet.protocol import topics
        from fleet.transport.base import Will
        from fleet.transport.mqtt import MqttTransport

    identity = Identity.load(folder)
    if identity.config.role is not Role.DEVICE:
        raise ConfigError(
            f"{folder} is the identity of a {identity.config.role}, expected a device's; "
            "make one with 'fleet enroll NAME --out DIR'"
        )
    config = AgentConfig.load(folder)
    if threads:
        config = msgspec.structs.replace(config, num_threads=threads)

    base = bundle or (Path(identity.config.bundle) if identity.config.bundle else None)
    supervisor = Supervisor(
        folder,
        config,
        base,
        partial(fetch_bundle, identity),
        partial(_print_serving, identity.name),
    )
    stop = stop_event()
    supervisor.prepare(stop)
    will = Will(topics.device_status(identity.name), Agent.will())
    with (
        MqttTransport.connect(identity, will=will) as transport,
        CertificateRenewer(identity, transport.reload_certificate),
    ):
        supervisor.run(transport)


@app.command("join")
def join_command(
    token: Annotated[
        str, typer.Argument(help="Token, printed by 'fleet enroll NAME'; '-' reads it from stdin.")
    ],
    server: Annotated[str, typer.Option(help="The fleet's service, https://HOST:PORT.")],
    out: Annotated[Path, typer.Option(help="Identity folder to make.")] = Path("device"),
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Join a fleet: make a key, request its certificate, and fetch the model."""
    with needs("edge"):
        import edge_agent.update.supervisor  # noqa: F401 (fails before the token is used up)
        from edge_agent.provisioning.join import join_fleet
        from edge_agent.state.bundle_slots import SlotStore
        from fleet.protocol.enrolment_api import EnrolmentToken

    enrolment_token = EnrolmentToken.parse(sys.stdin.readline() if token == "-" else token)
    identity = join_fleet(enrolment_token, server, out)
    bundle_id = SlotStore(out).load().current
    if bundle_id:
        _fetch_first_bundle(identity, bundle_id)
    if as_json:
        _print_joined(identity.config, out, bundle_id)
    elif identity.config.role is Role.DEVICE:
        print(f"{identity.name} has joined; start it with: edge-agent run {out}")
    else:
        print(f"{identity.name} has joined as {identity.config.role}; its identity is in {out}")


def _fetch_first_bundle(identity: Identity, bundle_id: str) -> None:
    from edge_agent.service_client import retry_while_away
    from edge_agent.update.download import FETCH_S, fetch_bundle

    stop = stop_event()
    try:
        with _progress_bar(f"bundle {bundle_id}") as on_progress:
            retry_while_away(
                lambda: fetch_bundle(identity, bundle_id, stop, on_progress),
                timeout_s=FETCH_S,
                stop=stop,
            )
    except FleetError as error:
        raise type(error)(
            f"{identity.name} has joined, but its bundle is missing: {error}; "
            f"'edge-agent run {identity.folder}' fetches it"
        ) from None


@contextmanager
def _progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar of received and total bytes on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
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


def _print_joined(config: IdentityConfig, folder: Path, bundle_id: str | None) -> None:
    fields = {"folder": str(folder), "bundle_id": bundle_id, **msgspec.to_builtins(config)}
    print(json.dumps(fields))


def main() -> None:
    """Run the command line."""
    run_command("edge-agent", app)
