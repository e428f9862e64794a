"""The command `edge-agent`."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from fleet.errors import ConfigError, FleetError, MissingExtraError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.callback()
def options() -> None:
    """A device of the fleet: answers prompts with the lower half of a language model."""


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(help="Identity folder, made by 'fleet enroll NAME --out DIR'.")],
    bundle: Annotated[
        Path | None, typer.Option(help="Model bundle; by default the one that the identity names.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of ONNX Runtime.")] = None,
) -> None:
    """Serve prompts until stopped."""
    try:
        import msgspec

        from edge_agent.agent import Agent
        from edge_agent.config import AgentConfig
    except ImportError as error:
        raise MissingExtraError(
            f"a device needs {error.name}, which is not installed; run: pip install 'cecollm-fleet[edge]'"
        ) from None
    from fleet import topics
    from fleet.identity import Identity
    from fleet.manifest import Bundle
    from fleet.mqtt import MqttTransport
    from fleet.transport import Will

    identity = Identity.load(folder)
    config = AgentConfig.load(folder)
    if threads:
        config = msgspec.structs.replace(config, num_threads=threads)
    model = bundle or (Path(identity.config.bundle) if identity.config.bundle else None)
    if model is None:
        raise ConfigError(f"{folder} names no bundle; pass one with --bundle DIR")
    loaded = Bundle.load(model, ("edge", "tokenizer"))
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    will = Will(topics.device_status(identity.name), Agent.will())
    with MqttTransport.connect(identity, will=will) as transport, Agent(transport, loaded, config):
        manifest = loaded.manifest
        exits = ", ".join(map(str, manifest.exits))
        print(
            f"device {identity.name} serves {manifest.model.name}, bundle {manifest.bundle_id}, exits {exits}",
            flush=True,
        )
        stop.wait()


def main() -> None:
    """Entry point: an error of ours is one line and exit status 1."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app()
    except FleetError as error:
        print(f"edge-agent: {error}", file=sys.stderr)
        sys.exit(1)
