"""`fleet bridge`: Home Assistant and the sensors of a house, over the house's own broker."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from fleet.cli.access import own_home
from fleet.cli.options import HomeOption, checked_name
from fleet.utils.optional_imports import needs
from fleet.utils.path_options import path_option
from fleet.utils.paths import absolute_path
from fleet.utils.printable import print_line
from fleet.utils.systemd_unit import service_user, write_units

APP: Final = "house"

HostOption = Annotated[str, typer.Option("--host", help="Host of the house's broker.")]
PortOption = Annotated[
    int | None,
    typer.Option(min=1, max=65535, help="Its port (default: that of MQTT, or of MQTT over TLS)."),
]
UserOption = Annotated[str | None, typer.Option("--user", help="User at the house's broker.")]
PasswordOption = Annotated[
    Path | None, path_option(help="File with the password of --user in its first line.")
]
TlsOption = Annotated[
    bool, typer.Option("--tls", help="Use TLS, and trust the authorities of this machine.")
]
CaOption = Annotated[
    Path | None, path_option("--ca", help="Use TLS, and trust this authority (PEM).")
]
CertOption = Annotated[
    Path | None, path_option("--cert", help="Certificate for the house's broker (PEM).")
]
CertKeyOption = Annotated[Path | None, path_option(help="Key of --cert (PEM).")]
MapOption = Annotated[
    list[str] | None,
    typer.Option(
        "--map", metavar="FILTER[=CHANNEL]", help="Topics that become events; repeatable."
    ),
]
AppOption = Annotated[
    str, typer.Option(help="Name of the bridge as an app of the fleet.", callback=checked_name)
]
UnitsOption = Annotated[
    Path | None,
    path_option(
        "--systemd", help="Enrol the bridge and write its unit into a folder, but do not start it."
    ),
]
ServiceUserOption = Annotated[
    str | None,
    typer.Option(
        "--service-user",
        help="With --systemd: user that runs it (default: the owner of the folder).",
    ),
]


def bridge(
    host: HostOption,
    port: PortOption = None,
    user: UserOption = None,
    password_file: PasswordOption = None,
    tls: TlsOption = False,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    maps: MapOption = None,
    app: AppOption = APP,
    systemd: UnitsOption = None,
    unit_user: ServiceUserOption = None,
    folder: HomeOption = None,
) -> None:
    """Show devices in Home Assistant, take its prompts, and bring mapped topics to triggers."""
    with needs("server"):
        from fleet.server.bridge.bridge_options import BridgeOptions, HouseAddress
        from fleet.server.bridge.bridge_process import bridge_unit, run_bridge
        from fleet.server.bridge.mapped_topics import TopicMap
    house = HouseAddress(
        host=host,
        port=port,
        user=user,
        password_file=password_file and absolute_path(password_file),
        tls=tls,
        ca_file=ca and absolute_path(ca),
        cert_file=cert and absolute_path(cert),
        key_file=cert_key and absolute_path(cert_key),
    )
    options = BridgeOptions(app=app, house=house, topic_map=TopicMap.parse(maps or ()))
    home = own_home(folder, "bridge")
    if systemd is None:
        run_bridge(home, options)
        return
    runs_as = service_user(home.folder, unit_user, "--service-user")
    units = bridge_unit(home, options, runs_as)
    write_units(systemd, units)
    (name,) = units
    print_line(
        f"wrote {name} into {systemd}; "
        f"next: systemctl daemon-reload && systemctl enable --now {name}"
    )
