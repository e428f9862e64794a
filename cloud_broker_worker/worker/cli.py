"""``python -m cloud_broker_worker run DIR``: one worker process."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, get_args

import typer

from fleet.errors import ConfigError, MissingExtraError
from fleet.utils.cli_runtime import run_command, stop_event, wait_stopped

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def options() -> None:
    """A cloud worker: answers devices with the upper half of a language model."""


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(help="Identity folder of role worker.")],
    bundle: Annotated[
        Path | None, typer.Option(help="Model bundle; by default the one that the identity names.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="float32, int8 or int4: fewer bits take less time.")
    ] = None,
    kv_budget_mb: Annotated[
        int | None, typer.Option(min=1, help="Memory for KV caches, in MB.")
    ] = None,
    drain_timeout: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds that sessions may still take once it is to stop."),
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, help="Serve /healthz, /readyz and /metrics over HTTP there."
        ),
    ] = None,
    metrics_host: Annotated[str, typer.Option(help="Address of --metrics-port.")] = "127.0.0.1",
) -> None:
    """Serve devices until stopped."""
    try:
        import msgspec

        from cloud_broker_worker.worker.config import Weights, WorkerConfig
        from cloud_broker_worker.worker.metrics import WorkerMonitor
        from cloud_broker_worker.worker.worker import Worker
        from fleet.monitoring.http_endpoint import HttpEndpoint
    except ImportError as error:
        raise MissingExtraError(
            f"a worker needs {error.name}, which is not installed; run: pip install 'cecollm-fleet[worker]'"
        ) from None
    from fleet.bundles.manifest import Bundle
    from fleet.identity.identity import Identity
    from fleet.protocol import topics
    from fleet.protocol.access import Role
    from fleet.transport.base import Will
    from fleet.transport.mqtt import MqttTransport

    identity = Identity.load(folder)
    if identity.config.role is not Role.WORKER:
        raise ConfigError(
            f"{folder} is the identity of a {identity.config.role}, expected a worker's; "
            "make one with 'fleet enroll NAME --role worker --out DIR'"
        )
    model = bundle or (Path(identity.config.bundle) if identity.config.bundle else None)
    if model is None:
        raise ConfigError(f"{folder} names no bundle; pass one with --bundle DIR")
    if weights and weights not in get_args(Weights):
        raise ConfigError(f"--weights {weights}: expected one of {', '.join(get_args(Weights))}")
    settings = {
        "num_threads": threads,
        "weights": weights,
        "kv_budget_bytes": kv_budget_mb and kv_budget_mb * 1_000_000,
        "drain_timeout_s": drain_timeout,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    config = msgspec.structs.replace(
        WorkerConfig(shared_opens=identity.config.shared_subscriptions), **given
    )
    loaded = Bundle.load(model, ("cloud",))
    stop = stop_event()
    will = Will(topics.worker_status(identity.name), Worker.will())
    with ExitStack() as stack:
        endpoint = (
            None
            if metrics_port is None
            else stack.enter_context(HttpEndpoint(metrics_host, metrics_port))
        )
        transport = stack.enter_context(MqttTransport.connect(identity, will=will))
        worker = stack.enter_context(Worker(transport, loaded, config))
        if endpoint:
            endpoint.show(WorkerMonitor(worker))
        manifest = loaded.manifest
        serves = f"{manifest.model.name}, bundle {manifest.bundle_id}"
        layers = f"layers {manifest.upload_layer} to {manifest.model.num_layers}"
        where = f", metrics on {endpoint.url}" if endpoint else ""
        print(f"worker {identity.name} serves {serves}, {layers}{where}", flush=True)
        wait_stopped(stop)
        print(
            f"worker {identity.name} finishes its sessions; stop it again to leave them", flush=True
        )
        worker.drain(stop_event())


def main() -> None:
    """Entry point."""
    run_command("worker", app)
