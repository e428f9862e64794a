"""`fleet up`: a whole fleet on this machine."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from fleet.cli.options import (
    BundleOption,
    HomeOption,
    MetricsPortOption,
    PortOption,
    RegistryOption,
    RetentionOption,
    ServicePortOption,
)
from fleet.server.home import (
    DEFAULT_PORT,
    DEFAULT_SERVICE_PORT,
    EMBEDDED,
    MOSQUITTO,
    FleetConfig,
    FleetHome,
    create_fleet,
    resolve_config,
)
from fleet.server.supervisor import (
    check_broker,
    check_port,
    fleet_processes,
    resolve_bundle,
    watch_processes,
)
from fleet.server.worker_pool import WorkerPool
from fleet.utils.cli_runtime import stop_event

HostOption = Annotated[str, typer.Option(help="Address that the broker listens on.")]
WorkersOption = Annotated[
    int, typer.Option(min=1, max=64, help="Number of workers that share the devices.")
]
BrokerOption = Annotated[
    str,
    typer.Option(help=f"{EMBEDDED} in the server's process, or {MOSQUITTO} in one of its own."),
]


def up(
    folder: HomeOption = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = DEFAULT_PORT,
    bundle: BundleOption = None,
    workers: WorkersOption = 1,
    service_port: ServicePortOption = DEFAULT_SERVICE_PORT,
    metrics_port: MetricsPortOption = None,
    registry: RegistryOption = None,
    retention_days: RetentionOption = None,
    broker: BrokerOption = EMBEDDED,
) -> None:
    """Start broker, registry, collector, service and workers; stop them with Ctrl-C."""
    check_broker(broker)
    check_port(host, port)
    if service_port:
        check_port(host, service_port, "--service-port")
    path = resolve_bundle(bundle, Console(stderr=True).print)
    folder = folder or FleetHome.default_folder()
    config = FleetConfig(host=host, port=port, bundle=str(path), service_port=service_port)
    home = create_fleet(folder, resolve_config(folder, config, registry, retention_days))
    default = home.keep_bundle(path)
    stop = stop_event()  # until now a signal ends the process at once
    shares = broker == MOSQUITTO
    pool = WorkerPool(home=home, default=default, num_workers=workers, shares=shares)
    with fleet_processes(home, workers, metrics_port, broker) as processes, pool:
        for worker in processes.workers:
            worker.wait_ready()
        for process in (*processes.servers, *processes.workers):
            print(f"{process.ready_line} (process {process.process.pid})")
        print(f"the fleet is up on {host}:{port}; next: fleet enroll NAME", flush=True)
        watch_processes(processes, stop, pool.step)
