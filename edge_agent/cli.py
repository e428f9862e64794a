"""The command `edge-agent`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import typer

from fleet.bundles.manifest import Manifest
from fleet.errors import ConfigError, FleetError, MissingExtraError
from fleet.utils.cli_runtime import run_command, stop_event

FETCH_S: Final = 3600.0  # for a bundle, when a device joins

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)


@app.callback()
def options() -> None:
    """A device of the fleet: answers prompts with the lower half of a language model."""


@app.command()
def run(
    folder: Annotated[
        Path, typer.Argument(help="Identity folder, made by 'fleet enroll NAME --out DIR'.")
    ],
    bundle: Annotated[
        Path | None, typer.Option(help="Model bundle; by default the one that the identity names.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of ONNX Runtime.")] = None,
) -> None:
    """Serve prompts until stopped."""
    _need("a device")
    import msgspec

    from edge_agent.config import AgentConfig
    from edge_agent.provisioning.certificate_renewer import Renewer
    from edge_agent.serving.agent import Agent
    from edge_agent.update.download import fetch_bundle
    from edge_agent.update.supervisor import Supervisor
    from fleet.identity.identity import Identity
    from fleet.protocol import topics
    from fleet.protocol.access import Role
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

    def say(manifest: Manifest) -> None:
        exits = ", ".join(map(str, manifest.exits))
        print(
            f"device {identity.name} serves {manifest.model.name}, bundle {manifest.bundle_id}, exits {exits}",
            flush=True,
        )

    base = bundle or (Path(identity.config.bundle) if identity.config.bundle else None)
    supervisor = Supervisor(folder, config, base, partial(fetch_bundle, identity), say)
    stop = stop_event()
    supervisor.prepare(stop)
    will = Will(topics.device_status(identity.name), Agent.will())
    with (
        MqttTransport.connect(identity, will=will) as transport,
        Renewer(identity, transport.renew),
    ):
        supervisor.run(transport)


@app.command()
def join(
    token: Annotated[
        str, typer.Argument(help="Token, printed by 'fleet enroll NAME'; '-' reads it from stdin.")
    ],
    server: Annotated[str, typer.Option(help="The fleet's service, https://HOST:PORT.")],
    out: Annotated[Path, typer.Option(help="Identity folder to be made.")] = Path("device"),
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Join a fleet: make a key, have it certified, fetch the model."""
    _need("joining")
    import msgspec

    from edge_agent.provisioning.join import join as join_fleet
    from edge_agent.service_client import persistently
    from edge_agent.state.bundle_slots import SlotStore
    from edge_agent.update.download import fetch_bundle
    from fleet.protocol.access import Role
    from fleet.protocol.enrolment_api import EnrolmentToken

    identity = join_fleet(
        EnrolmentToken.parse(sys.stdin.readline() if token == "-" else token), server, out
    )
    bundle = SlotStore(out).load().current
    stop = stop_event()
    if bundle:
        try:
            with _progress(f"bundle {bundle}") as progress:
                persistently(
                    lambda: fetch_bundle(identity, bundle, stop, progress),
                    timeout_s=FETCH_S,
                    stop=stop,
                )
        except FleetError as error:
            raise type(error)(
                f"{identity.name} has joined; its bundle is not here yet: {error}; 'edge-agent run {out}' fetches it"
            ) from None
    if as_json:
        joined = {"folder": str(out), "bundle_id": bundle, **msgspec.to_builtins(identity.config)}
        print(json.dumps(joined))
    elif identity.config.role is Role.DEVICE:
        print(f"{identity.name} has joined; start it with: edge-agent run {out}")
    else:
        print(f"{identity.name} has joined as {identity.config.role}; its identity is in {out}")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for bytes that are here and bytes of all; nothing where nobody looks."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda here, total: bar.update(task, completed=here, total=total)


def _need(what: str) -> None:
    """Raises MissingExtraError where the extra `edge` is not installed."""
    try:
        import edge_agent.update.supervisor  # noqa: F401 (which needs all of it)
    except ImportError as error:
        raise MissingExtraError(
            f"{what} needs {error.name}, which is not installed; run: pip install 'cecollm-fleet[edge]'"
        ) from None


def main() -> None:
    """Entry point."""
    run_command("edge-agent", app)
