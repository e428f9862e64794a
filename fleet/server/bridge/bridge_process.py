"""The process of a bridge: its identity, its links, and its systemd unit."""

from __future__ import annotations

import sys

from fleet.errors import ConfigError
from fleet.identity.identity import Identity
from fleet.protocol.access import Role
from fleet.protocol.topics import check_name
from fleet.server.bridge.bridge_options import BridgeOptions
from fleet.server.bridge.house_bridge import HouseBridge
from fleet.server.change_watcher import ChangeWatcher
from fleet.server.fleet_units import SERVER_SERVICE, WATCHDOG_S
from fleet.server.home import FleetHome, own_role
from fleet.transport.mqtt import MqttTransport
from fleet.utils.cli_runtime import stop_event, wait_stopped
from fleet.utils.host_address import host_port
from fleet.utils.printable import print_line
from fleet.utils.service_manager import READY, Watchdog, notify
from fleet.utils.systemd_unit import ServiceUnit, program_folders


def run_bridge(home: FleetHome, options: BridgeOptions) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigError: an option cannot be used.
        FleetError: the identity cannot be enrolled, or the registry is not available.
    """
    options.house.check()
    identity = bridge_identity(home, options.app)
    stop = stop_event()
    with (
        home.registry(actor=f"bridge {options.app}") as registry,
        MqttTransport.connect(identity, wait=False) as link,
    ):
        watcher = ChangeWatcher(registry)
        watcher.on_cycle = Watchdog().watch("ChangeWatcher")
        with HouseBridge(link, registry, watcher, options) as bridge:
            print_line(_announcement(bridge, options))
            sys.stdout.flush()
            notify(READY)
            wait_stopped(stop)


def bridge_identity(home: FleetHome, app: str) -> Identity:
    """Return the identity of a bridge, an app's, which is enrolled at its first use.

    It is kept in the fleet's folder.


    Raises:
        ConfigError: the fleet uses the name for another purpose.
        IdentityError: an app of this name was enrolled elsewhere.
    """
    if own_role(check_name(app)):
        raise ConfigError(f"--app {app}: it is a name of the fleet's own; choose another")
    identity = home.identity(app, Role.APP)
    identity.check_role(Role.APP, "choose another --app")
    return identity


def _announcement(bridge: HouseBridge, options: BridgeOptions) -> str:
    address = host_port(options.house.host, options.house.broker_port)
    shown = ", ".join(bridge.devices)
    hint = f"no device yet; next: fleet allow {bridge.app} DEVICE"
    return f"bridge {bridge.app} to the broker at {address}: {shown or hint}"


def bridge_unit(home: FleetHome, options: BridgeOptions, user: str) -> dict[str, str]:
    """Return the unit of a bridge by its file name.

    Raises:
        ConfigError: an option cannot be used.
    """
    options.house.check()
    bridge_identity(home, options.app)
    command = ("bridge", *options.arguments(), "--home", str(home.folder))
    unit = ServiceUnit(
        description=f"CE-CoLLM fleet: bridge {options.app}",
        command=[sys.executable, "-m", "fleet.cli", *command],
        user=user,
        after=[SERVER_SERVICE],
        writable=[home.folder],
        readable=[*program_folders(), *options.house.files],
        watchdog_s=WATCHDOG_S,
    )
    return {f"fleet-bridge-{options.app}.service": unit.render()}
