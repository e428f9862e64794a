"""The fleet of a command: that of a folder on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeVar

from fleet.operator_api.fleet_access import FleetAccess
from fleet.operator_api.operation import Operation, Request, Response
from fleet.server.home import FleetHome
from fleet.utils.optional_imports import needs

T = TypeVar("T")


@contextmanager
def fleet_access(folder: Path | None) -> Iterator[FleetAccess]:
    """Yield access to the fleet in `folder`, by default the user's.

    Raises:
        ConfigError: there is no fleet.
        RegistryError: its registry cannot be opened.
    """
    home = FleetHome.load(folder)
    with home.registry() as registry:
        with needs("server"):
            from fleet.server.operations.context import OperationContext
            from fleet.server.operations.local_access import LocalAccess
        yield LocalAccess(OperationContext(registry, home))


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
