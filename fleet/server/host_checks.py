"""Checks of `fleet doctor` on months of operation: limits, a unit for the next boot, renewal."""

from __future__ import annotations

import resource
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from cloud_broker_worker.broker.mosquitto import CONFIG, CONFIG_FILE
from fleet.protocol.access import Role
from fleet.registry.results import IdentityRow
from fleet.server.fleet_units import SERVER_SERVICE
from fleet.server.home import MOSQUITTO, FleetHome
from fleet.utils.printable import command_line, count

MAX_EMBEDDED_DEVICES: Final = 300
"""The largest number that `python -m tests.system.hostile_clients` connects to the broker."""

RESERVED_FILES: Final = 200  # descriptors of a server without a device
UNIT_FOLDERS: Final = tuple(
    map(Path, ("/etc/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system"))
)
SYSTEMD: Final = Path("/run/systemd/system")  # exists while systemd runs, sd_booted(3)
RENEWING_ROLES: Final = (Role.DEVICE, Role.WORKER)

CheckResult = tuple[str, str]
"""The finding, and the problem or ""."""


def check_descriptors(home: FleetHome) -> CheckResult:
    """Compare the limit of open files of this user with the number of devices."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_needed = _num_devices(home) + RESERVED_FILES
    finding = f"{limit:,} files can be open at once, {num_needed:,} are needed"
    if limit == resource.RLIM_INFINITY or limit >= num_needed:
        return finding, ""
    return finding, "too few for a connection of each device; use the units of 'fleet systemd'"


def check_units(_: FleetHome, folders: Iterable[Path] = UNIT_FOLDERS) -> CheckResult:
    """Look for the unit that starts the server; `fleet up` in a terminal is no problem."""
    for folder in folders:
        if (folder / SERVER_SERVICE).exists():
            return f"{SERVER_SERVICE} in {folder}", ""
    if SYSTEMD.is_dir():
        return "none: no process starts again after a reboot; see 'fleet systemd'", ""
    return "none: systemd does not run here", ""


def check_broker_limits(home: FleetHome) -> CheckResult:
    """Look for each limit that `fleet broker config` writes, and for too many devices."""
    config = home.folder / MOSQUITTO / CONFIG_FILE
    if config.exists():
        missing = sorted(_limits(CONFIG) - _limits(config.read_text(encoding="utf-8")))
        if not missing:
            return f"{config} has limits", ""
        return (
            f"{config} lacks {', '.join(missing)}",
            "one client can exhaust the broker; write its files again with "
            f"{command_line('fleet', 'broker', 'config', '--out', config.parent)}, "
            "and restart it",
        )
    num_devices = _num_devices(home)
    finding = f"{count(num_devices, 'device')}, no mosquitto"
    if num_devices <= MAX_EMBEDDED_DEVICES:
        return finding, ""
    return (
        finding,
        f"the embedded broker is for {MAX_EMBEDDED_DEVICES} devices; use mosquitto, "
        "with 'fleet up --broker mosquitto' or 'fleet systemd --broker mosquitto'",
    )


def _limits(config: str) -> set[str]:
    words = {line.split()[0] for line in config.splitlines() if line.strip()}
    return {word for word in words if word.startswith("max_") or word == "memory_limit"}


def _num_devices(home: FleetHome) -> int:
    with home.registry() as registry:
        return len(registry.stats.devices())


def is_renewed(home: FleetHome, row: IdentityRow) -> bool:
    """Whether a process renews this certificate: the server, or its holder at the service."""
    if home.has_identity(row.name):
        return True
    return bool(home.config.service_port) and row.role in RENEWING_ROLES
