"""`fleet console`: the console in a browser."""

from __future__ import annotations

import os
import socket
import sys
import webbrowser
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import urlsplit

import typer

from fleet.cli.access import fleet_access, own_home
from fleet.cli.operators import print_link
from fleet.cli.options import HomeOption, JsonOption
from fleet.errors import ConfigError, OfflineError
from fleet.operator_api.fleet_access import FleetAccess
from fleet.operator_api.operation import NoFields, OperatorRole
from fleet.operator_api.operator_operations import (
    ADD_OPERATOR,
    LIST_OPERATORS,
    MAKE_OPERATOR_LINK,
    NewOperator,
    OperatorLink,
    OperatorName,
)
from fleet.server.console_address import console_url

OWNER: Final = "owner"
"""The operator of the machine with the fleet's folder, who may do everything there anyway."""

CONNECT_S: Final = 5.0

OpenOption = Annotated[
    bool, typer.Option("--open/--no-open", help="Open the link in a browser on this machine.")
]


def console(
    folder: HomeOption = None, open_browser: OpenOption = True, as_json: JsonOption = False
) -> None:
    """Sign in to the console of this fleet: print a link, and open it in a browser."""
    home = own_home(folder, "console")
    check_console(home.folder)
    with fleet_access(folder) as access:
        link = owner_link(access)
    if open_browser and not as_json:
        open_link(link)
    else:
        print_link(link, as_json=as_json)


def open_link(link: OperatorLink) -> None:
    """Print a link, and open it in a browser if this machine has a screen."""
    print_link(link, as_json=False)
    sys.stdout.flush()
    if sys.platform != "linux" or os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"}:
        webbrowser.open(link.link)


def check_console(folder: Path) -> None:
    """Check that a server with a console runs.

    Raises:
        OfflineError: none runs for this folder.
        ConfigError: the address that it left is not usable.
    """
    url = console_url(folder)
    if url is None:
        raise OfflineError(
            "no server with a console runs for this fleet; start one with "
            "'fleet up --console 127.0.0.1:8885'"
        )
    parts = urlsplit(url)
    if not parts.hostname or not parts.port:
        raise ConfigError(f"the console's address {url[:80]!r} is damaged; restart the server")
    host = "127.0.0.1" if parts.hostname == "0.0.0.0" else parts.hostname
    try:
        socket.create_connection((host, parts.port), CONNECT_S).close()
    except OSError as error:
        raise OfflineError(
            f"the console at {url} cannot be reached ({error.strerror or error}); start the server "
            "again with --console"
        ) from None


def owner_link(access: FleetAccess) -> OperatorLink:
    """Return a link for the owner of the folder, who becomes an admin at the first time."""
    known = access.call(LIST_OPERATORS, NoFields()).operators
    if any(row.name == OWNER for row in known):
        return access.call(MAKE_OPERATOR_LINK, OperatorName(name=OWNER))
    return access.call(ADD_OPERATOR, NewOperator(name=OWNER, role=OperatorRole.ADMIN))
