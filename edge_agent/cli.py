"""The command `edge-agent`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fleet.command import run_command, stop_event
from fleet.errors import ConfigError, MissingExtraError

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
        from edge_agent.reports import REPORTS_FILE
    except ImportError as error:
        raise MissingExtraError(
            f"a device needs {error.name}, which is not installed; run: pip install 'cecollm-fleet[edge]'"
        ) from None
    from fleet import topics
    from fleet.access import Role
    from fleet.identity import Identity
    from fleet.manifest import Bundle
    from fleet.mqtt import MqttTransport
    from fleet.transport import Will

    identity = Identity.load(folder)
    if identity.config.role is not Role.DEVICE:
        raise ConfigError(
            f"{folder} is the identity of a {identity.config.role}, expected a device's; "
            "make one with 'fleet enroll NAME --out DIR'"
        )
    config = AgentConfig.load(folder)
    if threads:
        config = msgspec.structs.replace(config, num_threads=threads)
    model = bundle or (Path(identity.config.bundle) if identity.config.bundle else None)
    if model is None:
        raise ConfigError(f"{folder} names no bundle; pass one with --bundle DIR")
    loaded = Bundle.load(model, ("edge", "tokenizer"))
    stop = stop_event()
    will = Will(topics.device_status(identity.name), Agent.will())
    reports_file = folder / REPORTS_FILE
    with MqttTransport.connect(identity, will=will) as transport, Agent(transport, loaded, config, reports_file):
        manifest = loaded.manifest
        exits = ", ".join(map(str, manifest.exits))
        print(
            f"device {identity.name} serves {manifest.model.name}, bundle {manifest.bundle_id}, exits {exits}",
            flush=True,
        )
        stop.wait()


def main() -> None:
    """Entry point."""
    run_command("edge-agent", app)
