"""`fleet init`: the folder of a fleet whose components are started one by one, as in containers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fleet.cli.options import (
    HomeOption,
    PortOption,
    RegistryOption,
    RetentionOption,
    ServicePortOption,
)
from fleet.server.home import (
    DEFAULT_PORT,
    DEFAULT_SERVICE_PORT,
    FleetConfig,
    FleetHome,
    create_fleet,
    resolve_config,
)

HostOption = Annotated[str, typer.Option(help="Broker's address for devices and workers.")]
BundlePathOption = Annotated[
    Path, typer.Option(help="Folder of the bundle on the machines of devices and workers.")
]
ServiceHostOption = Annotated[
    str | None, typer.Option(help="Service's address for devices (default: HOST).")
]


def init(
    host: HostOption,
    bundle: BundlePathOption,
    port: PortOption = DEFAULT_PORT,
    service_port: ServicePortOption = DEFAULT_SERVICE_PORT,
    service_host: ServiceHostOption = None,
    registry: RegistryOption = None,
    retention_days: RetentionOption = None,
    folder: HomeOption = None,
) -> None:
    """Create or change the fleet's folder: authority, registry and identities. Starts nothing."""
    folder = folder or FleetHome.default_folder()
    config = FleetConfig(
        host=host,
        port=port,
        bundle=str(bundle),
        service_port=service_port,
        service_host=service_host,
    )
    home = create_fleet(folder, resolve_config(folder, config, registry, retention_days))
    print(
        f"a fleet in {home.folder} with its broker on {host}:{port}; "
        "next: fleet enroll, fleet server"
    )
