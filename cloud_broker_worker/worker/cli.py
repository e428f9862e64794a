"""``python -m cloud_broker_worker run DIR``: one worker process."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from cloud_broker_worker.worker.config import (
    AUTO,
    MAX_DRAIN_S,
    MAX_KV_BUDGET_MB,
    MAX_LAYER,
    MAX_NUM_SESSIONS,
    MAX_THREADS,
    NUM_SESSIONS,
    WorkerConfig,
    check_weight_format,
)
from fleet.bundles.manifest import Bundle
from fleet.errors import ConfigError
from fleet.identity.identity import Identity
from fleet.planning.machine_speeds import print_progress, report_speeds, warn_about_load
from fleet.protocol import topics
from fleet.protocol.access import Role
from fleet.transport.base import Will
from fleet.transport.mqtt import MqttTransport
from fleet.utils.cli_runtime import run_command, stop_event, wait_stopped
from fleet.utils.command_group import CommandGroup
from fleet.utils.optional_imports import needs
from fleet.utils.path_options import path_argument, path_option
from fleet.utils.service_manager import READY, Watchdog, notify

if TYPE_CHECKING:
    from cloud_broker_worker.worker.default_weights import WeightsChoice

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


WeightsOption = Annotated[
    str,
    typer.Option(
        help="Weights: float32, bfloat16, int8, int4, or auto for the fastest that keep the tokens."
    ),
]
SessionsOption = Annotated[
    int,
    typer.Option(
        "--expected-sessions",
        min=1,
        max=MAX_NUM_SESSIONS,
        help="Sessions that the worker is to serve at a time, for --weights auto.",
    ),
]


@app.callback()
def _cloud_worker() -> None:
    """Run a cloud worker, which has the upper layers of a language model."""


@app.command("run")
def run_worker(
    folder: Annotated[Path, path_argument(help="Identity folder of role worker.")],
    bundle: Annotated[
        Path | None, path_option(help="Model bundle; default: the identity's bundle.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=MAX_THREADS, help="Number of PyTorch threads.")
    ] = None,
    weights: WeightsOption = AUTO,
    expected_sessions: SessionsOption = NUM_SESSIONS,
    from_layer: Annotated[
        int | None,
        typer.Option(
            min=0, max=MAX_LAYER, help="Lowest layer to load; refuse devices with a lower split."
        ),
    ] = None,
    lower_layers: Annotated[
        bool,
        typer.Option(
            "--lower-layers",
            help="Load the lower layers as well, for devices that upload prompts as token ids.",
        ),
    ] = False,
    kv_budget_mb: Annotated[
        int | None, typer.Option(min=1, max=MAX_KV_BUDGET_MB, help="Memory for KV caches, in MB.")
    ] = None,
    drain_timeout: Annotated[
        float | None,
        typer.Option(
            min=0, max=MAX_DRAIN_S, help="Seconds to wait for sessions to end after a stop signal."
        ),
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port for /healthz, /readyz and /metrics over HTTP."),
    ] = None,
    metrics_host: Annotated[str, typer.Option(help="Address of --metrics-port.")] = "127.0.0.1",
    renew: Annotated[
        bool, typer.Option(help="Renew the certificate; the server renews those of `fleet up`.")
    ] = True,
) -> None:
    """Serve devices until stopped."""
    check_weight_format(weights)
    identity = _load_identity(folder)
    settings = {
        "num_threads": threads,
        "from_layer": from_layer,
        "lower_layers": lower_layers,
        "kv_budget_bytes": kv_budget_mb and kv_budget_mb * 1_000_000,
        "drain_timeout_s": drain_timeout,
    }
    config = _worker_config(identity, settings)
    model = bundle or identity.bundle
    if model is None:
        raise ConfigError(f"{folder} names no bundle; pass one with --bundle DIR")
    metrics = None if metrics_port is None else (metrics_host, metrics_port)
    opened = Bundle.load(model, ("cloud", "edge") if lower_layers else ("cloud",))
    choice = _choose_weights(weights, opened, config.num_threads, expected_sessions)
    config = msgspec.structs.replace(config, weights=choice.weights)
    _serve(identity, opened, config, metrics, reason=choice.reason, renews=renew)


@app.command("measure")
def measure_worker_speed(
    bundle: Annotated[Path, path_argument(help="Folder of a model bundle.")],
    out: Annotated[Path, path_option(help="File of the speeds, for 'fleet plan --worker'.")] = Path(
        "worker.json"
    ),
    threads: Annotated[
        int, typer.Option(min=1, max=MAX_THREADS, help="Number of PyTorch threads.")
    ] = WorkerConfig().num_threads,
    weights: WeightsOption = AUTO,
    expected_sessions: SessionsOption = NUM_SESSIONS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and write no file.")] = False,
) -> None:
    """Measure this worker's speed with a model, in less than a minute."""
    with needs("worker"):
        from cloud_broker_worker.worker.speed import measure_worker
        from cloud_broker_worker.worker.upper_layers import UpperLayers

    check_weight_format(weights)
    warn_about_load()
    opened = Bundle.load(bundle, ("cloud",))
    kind = _choose_weights(weights, opened, threads, expected_sessions).weights
    print_progress(f"weights {kind}")
    speeds = measure_worker(UpperLayers(opened, threads, kind), threads, kind, print_progress)
    report_speeds(speeds, out, as_json=as_json)


def _load_identity(folder: Path) -> Identity:
    identity = Identity.load(folder)
    identity.check_role(Role.WORKER, "make one with 'fleet enroll NAME --role worker --out DIR'")
    return identity


def _worker_config(identity: Identity, settings: dict[str, Any]) -> WorkerConfig:
    """Return the configuration with those of the settings that are not None."""
    config = WorkerConfig(shared_opens=identity.config.shared_subscriptions)
    changes = {name: value for name, value in settings.items() if value is not None}
    return msgspec.structs.replace(config, **changes)


def _choose_weights(
    weights: str, bundle: Bundle, num_threads: int, num_sessions: int
) -> WeightsChoice:
    """Return the given weights, or for `AUTO` those that suit this machine."""
    with needs("worker"):
        from cloud_broker_worker.worker.default_weights import WeightsChoice, choose_weights

    if weights == AUTO:
        return choose_weights(bundle, num_threads, num_sessions)
    given: Any = weights
    return WeightsChoice(given, "as given")


def _serve(
    identity: Identity,
    bundle: Bundle,
    config: WorkerConfig,
    metrics_address: tuple[str, int] | None,
    *,
    reason: str,
    renews: bool,
) -> None:
    """Serve until stopped, and wait for a broker that is away.

    `reason` is that of the weights, and `renews` is whether to renew the certificate.
    """
    with needs("worker"):
        from cloud_broker_worker.worker.metrics import WorkerMonitor
        from cloud_broker_worker.worker.worker import Worker
        from fleet.identity.certificate_renewer import CertificateRenewer
        from fleet.monitoring.http_endpoint import HttpEndpoint

    stop = stop_event()
    will = Will(topics.worker_status(identity.name), Worker.will())
    with ExitStack() as stack:
        endpoint = None
        if metrics_address is not None:
            endpoint = stack.enter_context(HttpEndpoint(*metrics_address))
        transport = stack.enter_context(MqttTransport.connect(identity, will=will, wait=False))
        if renews:
            stack.enter_context(CertificateRenewer(identity, transport.reload_certificate))
        worker = Worker(transport, bundle, config)
        worker.on_cycle = Watchdog().watch("worker")
        stack.enter_context(worker)
        if endpoint:
            endpoint.show(WorkerMonitor(worker))
        notify(READY)
        if not transport.wait_up(stop):
            return
        manifest = bundle.manifest
        model = f"{manifest.model.name}, bundle {manifest.bundle_id}"
        first = config.from_layer or manifest.upload_layer
        layers = f"layers {first} to {manifest.model.num_layers}"
        layers += ", the lower ones for prompts" if config.lower_layers else ""
        weights = f"weights {config.weights} ({reason})"
        metrics = f", metrics on {endpoint.url}" if endpoint else ""
        print(f"worker {identity.name} serves {model}, {layers}, {weights}{metrics}", flush=True)
        wait_stopped(stop)
        print(
            f"worker {identity.name} finishes its sessions; stop it again to end them", flush=True
        )
        worker.drain(stop_event())


def main() -> None:
    """Entry point."""
    run_command("worker", app)
