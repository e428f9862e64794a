"""`fleet init` and `fleet server`: a fleet whose parts are started one by one, as in containers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fleet.cli.stats import StateOption
from fleet.errors import ConfigError
from fleet.server.home import (
    DEFAULT_PORT,
    DEFAULT_SERVICE_PORT,
    FleetConfig,
    FleetHome,
    create_fleet,
    keeping,
)
from fleet.server.main import ServerOptions, run_server

RegistryOption = Annotated[
    str | None,
    typer.Option(help="postgresql://USER@HOST/DATABASE (default: a SQLite file in the folder)."),
]
RetentionOption = Annotated[
    int | None,
    typer.Option(min=1, help="Forget single answers after so long; their counts by the hour stay."),
]
MetricsPortOption = Annotated[
    int | None,
    typer.Option(
        min=0, max=65535, help="Serve /healthz, /readyz and /metrics over HTTP from there on."
    ),
]
ServicePortOption = Annotated[
    int,
    typer.Option(
        min=0, max=65535, help="Port of the HTTPS service where devices join; 0 is no service."
    ),
]


def init(
    host: Annotated[str, typer.Option(help="Where devices and workers reach the broker.")],
    bundle: Annotated[
        Path, typer.Option(help="Model bundle, where devices and workers will find it.")
    ],
    port: Annotated[int, typer.Option(min=1, max=65535)] = DEFAULT_PORT,
    service_port: ServicePortOption = DEFAULT_SERVICE_PORT,
    service_host: Annotated[
        str | None, typer.Option(help="Where devices reach the service (default: HOST).")
    ] = None,
    registry: RegistryOption = None,
    retention_days: RetentionOption = None,
    state: StateOption = None,
) -> None:
    """Make the fleet's folder, or change it: authority, registry, its own identities. Starts nothing."""
    folder = state or FleetHome.default_folder()
    config = FleetConfig(
        host=host,
        port=port,
        bundle=str(bundle),
        service_port=service_port,
        service_host=service_host,
    )
    fleet = create_fleet(folder, keeping(folder, config, registry, retention_days))
    print(
        f"a fleet in {fleet.folder} with its broker on {host}:{port}; next: fleet enroll, fleet server"
    )


def server(
    state: StateOption = None,
    broker: Annotated[
        bool, typer.Option(help="With the embedded broker, or with one that runs elsewhere.")
    ] = True,
    listen: Annotated[
        str | None, typer.Option(help="Address of broker and service (default: the fleet's).")
    ] = None,
    mosquitto: Annotated[
        Path | None,
        typer.Option(help="With --no-broker: folder of `fleet broker config` to keep in step."),
    ] = None,
    reload: Annotated[
        str | None,
        typer.Option(
            help="Command that makes that mosquitto read its files again (default: SIGHUP)."
        ),
    ] = None,
    metrics_port: MetricsPortOption = None,
    metrics_host: Annotated[str, typer.Option(help="Address of --metrics-port.")] = "127.0.0.1",
) -> None:
    """Run broker, collector and service alone; `fleet up` starts this."""
    if mosquitto and broker:
        raise ConfigError("--mosquitto keeps a broker that runs elsewhere in step; add --no-broker")
    fleet = FleetHome.load(state or FleetHome.default_folder())
    metrics = None if metrics_port is None else (metrics_host, metrics_port)
    run_server(
        fleet,
        ServerOptions(
            listen=listen, has_broker=broker, mosquitto=mosquitto, reload=reload, metrics=metrics
        ),
    )
