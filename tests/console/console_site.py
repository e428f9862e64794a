"""A console over a fleet with one of each thing, and clients of each role."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fleet.http_api.api_address import ApiAddress
from fleet.operator_api.operation import OperatorRole
from fleet.registry.store import Registry
from fleet.server.console.console_server import ConsoleServer
from fleet.server.console.pages.page_routes import page_routes
from fleet.server.console.playground import Playground
from fleet.server.operations.context import OperationContext
from fleet.transport.in_memory import InMemoryBroker
from tests.console.web_client import WebClient, sign_in
from tests.fleet.operator_api.api_fleet import make_fleet

PUBLIC: Final = "public"
LEVELS: Final = (PUBLIC, *OperatorRole)


class ConsoleSite:
    """The server, and a client of each role, whose operator has the name of the role."""

    def __init__(self, server: ConsoleServer, registry: Registry) -> None:
        self.server = server
        self.registry = registry
        self.clients = {PUBLIC: WebClient(server.port)}
        for role in OperatorRole:
            registry.operators.add(role.value, role)
            self.clients[role] = self.sign_in(role)

    @property
    def admin(self) -> WebClient:
        return self.clients[OperatorRole.ADMIN]

    def visitor(self) -> WebClient:
        """Return a client that is not signed in."""
        return WebClient(self.server.port)

    def sign_in(self, role: OperatorRole) -> WebClient:
        """Return a client with a session of its own."""
        return sign_in(self.registry, role.value, self.server.port)

    def new_link(self, role: OperatorRole = OperatorRole.ADMIN) -> str:
        """Return the secret of a new link."""
        return str(self.registry.operators.make_link(role.value).secret)

    def new_key(self, role: OperatorRole = OperatorRole.ADMIN) -> str:
        return str(self.registry.operators.create_key(role.value, None).secret)

    def operators(self) -> set[str]:
        """Return the names of the operators."""
        return {row.name for row in self.registry.operators.all()}


@contextmanager
def console_site(folder: Path) -> Iterator[ConsoleSite]:
    """Run the console of a new fleet."""
    home = make_fleet(folder / "home")
    address = ApiAddress("127.0.0.1", 0)
    with (
        home.registry("tests") as registry,
        Playground(InMemoryBroker().connect("console")) as playground,
        ConsoleServer(
            address,
            OperationContext(registry, home),
            None,
            [page_routes, playground.routes],
        ) as server,
    ):
        yield ConsoleSite(server, registry)
