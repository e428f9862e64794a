"""`fleet init`: the folder of a fleet whose components are started one by one, as in containers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fleet.bundles.manifest import Bundle
from fleet.cli.access import own_folder
from fleet.cli.options import (
    HomeOption,
    PortOption,
    RegistryOption,
    RetentionOption,
    ServicePortOption,
)
from fleet.server.fleet_options import FleetOptions, resolve_config
from fleet.server.home import create_fleet
from fleet.utils.host_address import host_port
from fleet.utils.path_options import path_option
from fleet.utils.paths import absolute_path
from fleet.utils.printable import print_line

HostOption = Annotated[str, typer.Option(help="Broker's address for devices and workers.")]
BundlePathOption = Annotated[
    Path, path_option(help="Folder of the bundle, here and on the machines of workers.")
]
ServiceHostOption = Annotated[
    str | None, typer.Option(help="Service's address for devices (default: HOST).")
]


def init(
    host: HostOption,
    bundle: BundlePathOption,
    port: PortOption = None,
    service_port: ServicePortOption = None,
    service_host: ServiceHostOption = None,
    registry: RegistryOption = None,
    retention_days: RetentionOption = None,
    folder: HomeOption = None,
) -> None:
    """Create or change the fleet's folder: authority, registry and identities. Starts nothing."""
    folder = own_folder(folder, "init")
    options = FleetOptions(
        host=host,
        port=port,
        bundle=str(Bundle.load(absolute_path(bundle), ()).folder),
        service_port=service_port,
        service_host=service_host,
        registry=registry,
        retention_days=retention_days,
    )
    home = create_fleet(folder, resolve_config(folder, options))
    address = host_port(home.config.host, home.config.port)
    print_line(
        f"a fleet in {folder} with its broker on {address}; next: fleet enroll, fleet server"
    )
