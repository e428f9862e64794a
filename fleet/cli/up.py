"""`fleet up`: a whole fleet on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from cloud_broker_worker.worker.config import (
    MAX_KV_BUDGET_MB,
    MAX_NUM_SESSIONS,
    MAX_THREADS,
    MIN_AGREEMENT,
    NUM_SESSIONS,
    check_weight_format,
)
from fleet.bundles.manifest import Bundle
from fleet.cli.access import own_folder
from fleet.cli.options import (
    ApiCertKeyOption,
    ApiCertOption,
    ApiOption,
    BundleOption,
    ConsoleCertKeyOption,
    ConsoleCertOption,
    ConsoleOption,
    HomeOption,
    MetricsPortOption,
    PortOption,
    RegistryOption,
    RetentionOption,
    ServicePortOption,
)
from fleet.http_api.api_certificate import ApiCertificate
from fleet.protocol.access import Role
from fleet.server.fleet_options import (
    DEFAULT_HOST,
    FleetOptions,
    hold_folder,
    resolve_config,
)
from fleet.server.gateway.api_options import ApiOptions
from fleet.server.home import (
    EMBEDDED,
    MOSQUITTO,
    FleetHome,
    ca_passphrase,
    create_fleet,
)
from fleet.server.supervisor import (
    check_broker,
    check_metrics_ports,
    check_port,
    check_ports,
    fleet_processes,
    watch_processes,
)
from fleet.server.worker_pool import WorkerPool
from fleet.server.worker_settings import WorkerSettings
from fleet.utils.cli_runtime import stop_event
from fleet.utils.console import new_console
from fleet.utils.host_address import host_port
from fleet.utils.paths import absolute_path
from onnx_export.default_bundle import default_bundle

HostOption = Annotated[
    str | None,
    typer.Option(help=f"This machine's name or address for devices (default: {DEFAULT_HOST})."),
]
ListenOption = Annotated[
    str | None, typer.Option(help="Address to listen on, such as 0.0.0.0 (default: HOST).")
]
WorkersOption = Annotated[
    int, typer.Option(min=1, max=64, help="Number of workers that share the devices.")
]
BrokerOption = Annotated[
    str,
    typer.Option(help=f"{EMBEDDED} in the server's process, or {MOSQUITTO} in one of its own."),
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        help="Weights of the workers: float32, bfloat16, int8, int4, or auto: the fastest that "
        f"agree with float32 on {MIN_AGREEMENT:.1%} of tokens (default)."
    ),
]
ExpectedSessionsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MAX_NUM_SESSIONS,
        help="Sessions that each worker is to serve at a time, for the choice of its weights "
        f"(default: {NUM_SESSIONS}).",
    ),
]
KvBudgetOption = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_KV_BUDGET_MB, help="Memory of each worker for KV caches, in MB."),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_THREADS, help="Number of PyTorch threads of each worker."),
]
LowerLayersOption = Annotated[
    bool,
    typer.Option(
        "--lower-layers",
        help="Load the lower layers in each worker, for prompts that come as token ids.",
    ),
]


def up(
    folder: HomeOption = None,
    host: HostOption = None,
    listen: ListenOption = None,
    port: PortOption = None,
    bundle: BundleOption = None,
    workers: WorkersOption = 1,
    weights: WeightsOption = None,
    expected_sessions: ExpectedSessionsOption = None,
    kv_budget_mb: KvBudgetOption = None,
    threads: ThreadsOption = None,
    lower_layers: LowerLayersOption = False,
    service_port: ServicePortOption = None,
    metrics_port: MetricsPortOption = None,
    registry: RegistryOption = None,
    retention_days: RetentionOption = None,
    broker: BrokerOption = EMBEDDED,
    api: ApiOption = None,
    api_cert: ApiCertOption = None,
    api_cert_key: ApiCertKeyOption = None,
    console: ConsoleOption = None,
    console_cert: ConsoleCertOption = None,
    console_cert_key: ConsoleCertKeyOption = None,
) -> None:
    """Start broker, registry, collector, service and workers; stop them with Ctrl-C."""
    check_broker(broker)
    if weights:
        check_weight_format(weights)
    api_options = ApiOptions.of(api, api_cert, api_cert_key)
    console_options = ApiOptions.of_console(console, console_cert, console_cert_key)
    web_servers = [each for each in (api_options, console_options) if each]
    settings = WorkerSettings(
        weights=weights,
        expected_sessions=expected_sessions,
        kv_budget_mb=kv_budget_mb,
        threads=threads,
        lower_layers=lower_layers,
    )
    options = FleetOptions(
        host=host,
        port=port,
        bundle=str(absolute_path(bundle)) if bundle else None,
        service_port=service_port,
        registry=registry,
        retention_days=retention_days,
    )
    folder = own_folder(folder, "up")
    ca_passphrase()  # an unusable one is refused before the model is fetched
    with hold_folder(folder):
        config = resolve_config(folder, options)
        check_metrics_ports(config, metrics_port, workers)
        check_ports(config, listen)
        for each in web_servers:
            _check_web_server(each)
        if not config.bundle:
            path = default_bundle(new_console(stderr=True).print)
            config = msgspec.structs.replace(config, bundle=str(path))
        Bundle.load(Path(config.bundle), ())  # before it is written down
        home = create_fleet(folder, config)
        for each in web_servers:
            home.identity(each.gateway, Role.GATEWAY)  # before a broker starts and reads its rights
        _run(
            home,
            workers,
            metrics_port,
            broker,
            listen=listen,
            settings=settings,
            web_servers=web_servers,
        )


def _check_web_server(options: ApiOptions) -> None:
    """Raise ConfigError when the port is in use, or the certificate cannot be used."""
    check_port(options.address.host, options.address.port, options.option)
    if options.cert_file and options.key_file:
        ApiCertificate(options.cert_file, options.key_file)


def _run(
    home: FleetHome,
    workers: int,
    metrics_port: int | None,
    broker: str,
    *,
    listen: str | None,
    settings: WorkerSettings,
    web_servers: Sequence[ApiOptions],
) -> None:
    """Run all processes of a fleet until this one is stopped."""
    default = home.keep_bundle(Path(home.config.bundle))
    stop = stop_event()  # until now a signal ends the process at once
    shares = broker == MOSQUITTO
    pool = WorkerPool(
        home=home, default=default, num_workers=workers, shares=shares, settings=settings
    )
    running = fleet_processes(
        home,
        workers,
        metrics_port,
        broker,
        listen=listen,
        settings=settings,
        server_options=[word for each in web_servers for word in each.arguments()],
    )
    with running as processes, pool:
        for server in processes.servers:
            print(f"{server.ready_line} (process {server.process.pid})", flush=True)
        for worker in processes.workers:
            print(f"{worker.wait_ready()} (process {worker.process.pid})", flush=True)
        address = host_port(home.config.host, home.config.port)
        print(f"the fleet is up on {address}; next: fleet enroll NAME", flush=True)
        watch_processes(processes, stop, pool.step)
