"""`fleet server`: the server process alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fleet.cli.access import own_home
from fleet.cli.options import (
    ApiCertKeyOption,
    ApiCertOption,
    ApiOption,
    ConsoleCertKeyOption,
    ConsoleCertOption,
    ConsoleOption,
    HomeOption,
    MetricsPortOption,
)
from fleet.errors import ConfigError
from fleet.utils.optional_imports import needs
from fleet.utils.path_options import path_option

BrokerOption = Annotated[
    bool, typer.Option(help="Run the embedded broker, or use one that runs elsewhere.")
]
ListenOption = Annotated[
    str | None, typer.Option(help="Address of broker and service (default: the fleet's).")
]
MosquittoOption = Annotated[
    Path | None,
    path_option(help="With --no-broker: folder of `fleet broker config` to keep in step."),
]
ReloadOption = Annotated[
    str | None,
    typer.Option(help="Command that makes that mosquitto reload its files (default: SIGHUP)."),
]
MetricsHostOption = Annotated[str, typer.Option(help="Address of --metrics-port.")]


def server(
    folder: HomeOption = None,
    broker: BrokerOption = True,
    listen: ListenOption = None,
    mosquitto: MosquittoOption = None,
    reload: ReloadOption = None,
    metrics_port: MetricsPortOption = None,
    metrics_host: MetricsHostOption = "127.0.0.1",
    api: ApiOption = None,
    api_cert: ApiCertOption = None,
    api_cert_key: ApiCertKeyOption = None,
    console: ConsoleOption = None,
    console_cert: ConsoleCertOption = None,
    console_cert_key: ConsoleCertKeyOption = None,
) -> None:
    """Run broker, collector and service alone; `fleet up` starts this."""
    with needs("server"):
        from fleet.server.gateway.api_options import ApiOptions
        from fleet.server.main import ServerOptions, run_server
        from fleet.server.supervisor import check_metrics_ports
    if mosquitto and broker:
        raise ConfigError("--mosquitto keeps a broker that runs elsewhere in step; add --no-broker")
    options = ServerOptions(
        listen=listen,
        has_broker=broker,
        mosquitto=mosquitto,
        reload=reload,
        metrics=None if metrics_port is None else (metrics_host, metrics_port),
        api=ApiOptions.of(api, api_cert, api_cert_key),
        console=ApiOptions.of_console(console, console_cert, console_cert_key),
    )
    home = own_home(folder, "server")
    if broker:
        check_metrics_ports(home.config, metrics_port, 0)
    run_server(home, options)
