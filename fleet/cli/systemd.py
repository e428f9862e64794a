"""`fleet systemd`: unit files for the processes of a fleet on this machine."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Final

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
)
from fleet.server.fleet_units import (
    BACKUP_SERVICE,
    UnitOptions,
    fleet_units,
    stale_units,
    worker_unit,
)
from fleet.server.gateway.api_options import ApiOptions
from fleet.server.home import EMBEDDED, MOSQUITTO
from fleet.utils.path_options import path_option
from fleet.utils.paths import absolute_path
from fleet.utils.printable import print_line
from fleet.utils.systemd_unit import service_user, write_units

BACKUPS: Final = Path("/var/lib/cecollm-fleet-backups")

OutOption = Annotated[Path, path_option(help="Folder of the units; systemd's own for use.")]
UserOption = Annotated[
    str | None, typer.Option(help="User that runs them (default: the owner of the folder).")
]
BrokerOption = Annotated[str, typer.Option(help=f"{EMBEDDED} in the server, or {MOSQUITTO}.")]
WorkersOption = Annotated[
    int, typer.Option(min=0, max=64, help="Number of the fleet's own workers on this machine.")
]
ListenOption = Annotated[
    str | None, typer.Option(help="Address of broker and service (default: the fleet's).")
]
BackupsOption = Annotated[Path, path_option(help="Folder of the daily backups.")]
WorkerOption = Annotated[
    Path | None, path_option(help="Write only the unit of the worker with this identity folder.")
]


def systemd(
    out: OutOption,
    user: UserOption = None,
    broker: BrokerOption = EMBEDDED,
    workers: WorkersOption = 1,
    listen: ListenOption = None,
    backups: BackupsOption = BACKUPS,
    worker: WorkerOption = None,
    api: ApiOption = None,
    api_cert: ApiCertOption = None,
    api_cert_key: ApiCertKeyOption = None,
    console: ConsoleOption = None,
    console_cert: ConsoleCertOption = None,
    console_cert_key: ConsoleCertKeyOption = None,
    folder: HomeOption = None,
) -> None:
    """Write hardened systemd units: server, broker, workers, and a daily backup."""
    if worker:
        identity = absolute_path(worker)
        units = {"fleet-worker.service": worker_unit(identity, service_user(identity, user))}
    else:
        home = own_home(folder, "systemd")
        options = UnitOptions(
            user=service_user(home.folder, user),
            broker=broker,
            num_workers=workers,
            listen=listen,
            backups=absolute_path(backups),
            api=ApiOptions.of(api, api_cert, api_cert_key),
            console=ApiOptions.of_console(console, console_cert, console_cert_key),
        )
        units = fleet_units(home, options)
    write_units(out, units)
    enabled = " ".join(name for name in units if name != BACKUP_SERVICE)
    print_line(
        f"wrote {', '.join(units)} into {out}; "
        f"next: systemctl daemon-reload && systemctl enable --now {enabled}"
    )
    if worker is None and (stale := stale_units(out, units)):
        remove = shlex.join(["rm", *(str(out / name) for name in stale)])
        print_line(
            f"of an earlier run are {', '.join(stale)}; "
            f"next: systemctl disable --now {' '.join(stale)} && {remove}"
        )
