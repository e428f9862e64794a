"""The fleet of a command: that of a folder on this machine, or of a server elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple, TypeVar

import typer

from fleet.cli.local_commands import LOCAL_COMMANDS
from fleet.errors import ConfigError
from fleet.operator_api.fleet_access import FleetAccess
from fleet.operator_api.operation import Operation, Request, Response
from fleet.server.home import FleetHome
from fleet.utils.optional_imports import needs
from fleet.utils.path_options import path_option
from fleet.utils.paths import absolute_path
from fleet.utils.text_files import read_text

if TYPE_CHECKING:
    from fleet.operator_api.remote_access import RemoteAccess

KEY: Final = "FLEET_KEY"
T = TypeVar("T")

ServerOption = Annotated[
    str | None,
    typer.Option(
        envvar="FLEET_SERVER",
        metavar="URL",
        help="Server of the fleet, at its --console address; with $FLEET_KEY or --key-file.",
    ),
]
KeyFileOption = Annotated[
    Path | None, path_option(help="File with an operator's key for --server.")
]
CaFileOption = Annotated[
    Path | None,
    path_option(
        envvar="FLEET_CA_FILE", help="The fleet's ca.pem, for --server (default: the system's CAs)."
    ),
]


class ChosenServer(NamedTuple):
    """The server that the options of `fleet` name."""

    url: str
    key_file: Path | None
    ca_file: Path | None


CHOSEN: Final[ContextVar[ChosenServer | None]] = ContextVar("server", default=None)


def choose_server(
    context: typer.Context, url: str | None, key_file: Path | None, ca_file: Path | None
) -> None:
    """Let the command of a context use a server, if `url` names one.

    Raises:
        ConfigError: there is a key, but no server.
    """
    if not url:
        if key_file:
            raise ConfigError("--key-file is for --server URL; give both, or none of them")
        return
    token = CHOSEN.set(ChosenServer(url, key_file, ca_file))
    context.call_on_close(lambda: CHOSEN.reset(token))


def is_remote() -> bool:
    """Whether the command uses a server instead of the fleet's folder."""
    return CHOSEN.get() is not None


def own_folder(folder: Path | None, command: str) -> Path:
    """Return the folder of a command of `LOCAL_COMMANDS`, by default the user's.

    Raises:
        ConfigError: the command shall use a server instead.
    """
    reason = LOCAL_COMMANDS[command]
    server = CHOSEN.get()
    if server is not None:
        raise ConfigError(
            f"'fleet {command}' needs the fleet's folder: {reason}; run it at the machine with "
            f"the folder, without --server or $FLEET_SERVER ({server.url[:200]})"
        )
    return FleetHome.find(folder)


def own_home(folder: Path | None, command: str) -> FleetHome:
    """Return the fleet of a command of `LOCAL_COMMANDS`.

    Raises:
        ConfigError: there is no fleet, or the command shall use a server instead.
    """
    return FleetHome.load(own_folder(folder, command))


@contextmanager
def fleet_access(folder: Path | None) -> Iterator[FleetAccess]:
    """Yield access to the fleet of the server that was chosen, else to that in `folder`.

    Raises:
        ConfigError: there is no fleet, or the server or the key is not usable.
        RegistryError: the registry cannot be opened.
    """
    server = CHOSEN.get()
    if server is not None:
        with remote_access(folder) as access:
            yield access
        return
    home = FleetHome.load(folder)
    with home.registry() as registry:
        with needs("server"):
            from fleet.server.operations.context import OperationContext
            from fleet.server.operations.local_access import LocalAccess
        yield LocalAccess(OperationContext(registry, home))


@contextmanager
def remote_access(folder: Path | None) -> Iterator[RemoteAccess]:
    """Yield access to the fleet of the server that was chosen.

    Raises:
        ConfigError: none was chosen, or it or the key is not usable.
    """
    from fleet.operator_api.remote_access import RemoteAccess

    server = CHOSEN.get()
    if server is None:
        raise ConfigError("no server was chosen; give --server URL")
    if folder is not None:
        raise ConfigError("--home and --server exclude each other; give one of them")
    with RemoteAccess(server.url, _read_key(server.key_file), server.ca_file) as access:
        yield access


def _read_key(file: Path | None) -> str:
    """Return the key of a file, or else of the environment. Raises ConfigError."""
    if file is not None:
        return read_text(absolute_path(file), "give --key-file the path of a key").strip()
    key = os.environ.get(KEY, "").strip()
    if not key:
        raise ConfigError(f"--server needs an operator's key: set {KEY}, or give --key-file")
    return key


def call_fleet(
    folder: Path | None, operation: Operation[Request, Response], request: Request
) -> Response:
    """Return the response of one operation.

    Raises:
        FleetError: as `fleet_access` and the operation.
    """
    with fleet_access(folder) as access:
        return access.call(operation, request)


def latest_rows(pages: Iterable[Iterable[T]], limit: int) -> list[T]:
    """Return at most `limit` rows; a page that has none of them is not fetched."""
    return list(islice((row for page in pages for row in page), limit))
