"""The systemd units of a fleet on one machine: server, broker, workers and daily backup."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloud_broker_worker.broker.mosquitto import CONFIG_FILE, find_mosquitto
from fleet.errors import ConfigError
from fleet.identity.identity import Identity
from fleet.protocol.access import Role
from fleet.server.gateway.api_options import ApiOptions
from fleet.server.home import MOSQUITTO, FleetHome
from fleet.server.supervisor import check_broker, worker_folder, worker_name
from fleet.server.worker_settings import WorkerSettings
from fleet.utils.paths import absolute_path
from fleet.utils.systemd_unit import ServiceUnit, program_folders

SERVER_SERVICE: Final = "fleet-server.service"
MOSQUITTO_SERVICE: Final = "fleet-mosquitto.service"
BACKUP_SERVICE: Final = "fleet-backup.service"
BACKUP_TIMER: Final = "fleet-backup.timer"
WATCHDOG_S: Final = 180  # more than the longest step of a worker, or query of a registry
LOAD_S: Final = 900  # for a large model, or the migration of a large registry
DRAIN_S: Final = 30
KEPT_BACKUPS: Final = 14

TIMER: Final = """\
[Unit]
Description=CE-CoLLM fleet: a backup each day

[Timer]
OnCalendar=daily
RandomizedDelaySec=1h
Persistent=yes

[Install]
WantedBy=timers.target
"""


@dataclass(frozen=True, kw_only=True)
class UnitOptions:
    """Options of `fleet systemd`.

    Broker and service listen on `listen`, or on the fleet's host; `api` and `console` are those of
    `fleet up`.
    """

    user: str
    broker: str
    num_workers: int
    listen: str | None
    backups: Path
    api: ApiOptions | None = None
    console: ApiOptions | None = None

    @property
    def web_servers(self) -> list[ApiOptions]:
        """The options of the web servers that were chosen."""
        return [each for each in (self.api, self.console) if each]


def fleet_units(home: FleetHome, options: UnitOptions) -> dict[str, str]:
    """Return the units of the fleet in `home` by file name; enrol its workers, and its gateway.

    Raises:
        ConfigError: `fleet up` does not know the broker, or the broker is not installed.
        FleetError: a worker cannot be enrolled, or the fleet's bundle cannot be read.
    """
    check_broker(options.broker)
    shares = options.broker == MOSQUITTO
    names = [worker_name(number) for number in range(1, options.num_workers + 1)]
    for each in options.web_servers:
        home.identity(each.gateway, Role.GATEWAY)  # before the broker first reads the rights
    units = {SERVER_SERVICE: _server_unit(home, options)}
    if shares:
        units[MOSQUITTO_SERVICE] = _mosquitto_unit(home, options.user)
    bundle = absolute_path(Path(home.config.bundle))
    for name in names:
        identity = worker_folder(home, name, shares=shares)
        arguments = WorkerSettings().arguments(bundle, len(names))
        arguments.append("--no-renew")  # the server renews the fleet's own identities
        unit = _worker_unit(identity, bundle, arguments, options.user)
        units[f"fleet-{name}.service"] = unit
    texts = {name: unit.render() for name, unit in units.items()}
    backup = _backup_unit(home, options)
    return texts | {BACKUP_SERVICE: backup.render(), BACKUP_TIMER: TIMER}


def stale_units(out: Path, units: Collection[str]) -> list[str]:
    """Return the units in `out` of an earlier run with more workers, or with mosquitto.

    ``fleet-worker.service``, of a worker with a folder of its own, is no unit of the fleet.
    """
    names = (path.name for path in out.glob("fleet-*.service"))
    own = re.compile(rf"fleet-worker-\d+\.service|{re.escape(MOSQUITTO_SERVICE)}")
    return sorted(name for name in names if own.fullmatch(name) and name not in units)


def worker_unit(folder: Path, user: str) -> str:
    """Return the unit of a worker whose identity folder came from another machine.

    Raises:
        IdentityError: there is no identity in the folder.
        ConfigError: the identity has a different role, or names no bundle.
        BundleError: the bundle cannot be read.
    """
    identity = Identity.load(folder)
    remedy = "make one with 'fleet enroll NAME --role worker --out DIR --bundle DIR'"
    identity.check_role(Role.WORKER, remedy)
    bundle = identity.bundle
    if bundle is None:
        raise ConfigError(f"{folder} names no bundle, which a worker serves; {remedy}")
    arguments = WorkerSettings().arguments(bundle, num_workers=1)
    return _worker_unit(folder, bundle, arguments, user).render()


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def _server_unit(home: FleetHome, options: UnitOptions) -> ServiceUnit:
    arguments = ["server", "--home", str(home.folder)]
    if options.broker == MOSQUITTO:
        arguments += ["--no-broker", "--mosquitto", str(home.folder / MOSQUITTO)]
    if options.listen:
        arguments += ["--listen", options.listen]
    files: list[Path] = []
    for each in options.web_servers:
        arguments += each.arguments()
        files += each.files
    return ServiceUnit(
        description="CE-CoLLM fleet: server",
        command=_module("fleet.cli", *arguments),
        user=options.user,
        after=[MOSQUITTO_SERVICE] if options.broker == MOSQUITTO else ["postgresql.service"],
        writable=[home.folder],
        readable=[*program_folders(), Path(home.config.bundle), *files],
        watchdog_s=WATCHDOG_S,
        start_s=LOAD_S,
    )


def _mosquitto_unit(home: FleetHome, user: str) -> ServiceUnit:
    """Return the unit of mosquitto. It writes mosquitto's files again before each start.

    So the certificate and the revocation list are valid even after months.
    """
    folder = home.folder / MOSQUITTO
    write = ("broker", "config", "--home", str(home.folder), "--out", str(folder))
    return ServiceUnit(
        description="CE-CoLLM fleet: mosquitto",
        before=[_module("fleet.cli", *write)],
        command=[find_mosquitto(), "-c", str(folder / CONFIG_FILE)],
        user=user,
        writable=[home.folder],
        readable=program_folders(),
        reload="/bin/kill -HUP $MAINPID",
    )


def _worker_unit(folder: Path, bundle: Path, arguments: Sequence[str], user: str) -> ServiceUnit:
    command = ("run", str(folder), *arguments, "--drain-timeout", str(DRAIN_S))
    return ServiceUnit(
        description=f"CE-CoLLM fleet: worker {folder.name}",
        command=_module("cloud_broker_worker", *command),
        user=user,
        after=[SERVER_SERVICE],
        writable=[folder],
        readable=[*program_folders(), bundle],
        watchdog_s=WATCHDOG_S,
        start_s=LOAD_S,
        stop_s=2 * DRAIN_S,
    )


def _backup_unit(home: FleetHome, options: UnitOptions) -> ServiceUnit:
    arguments = ("backup", str(options.backups), "--home", str(home.folder))
    return ServiceUnit(
        description="CE-CoLLM fleet: backup",
        command=_module("fleet.cli", *arguments, "--keep", str(KEPT_BACKUPS)),
        user=options.user,
        writable=[home.folder, options.backups],
        readable=program_folders(),
        is_oneshot=True,
    )
