"""One page: its data comes from operations, with the rights of its operator."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias, TypeVar

from aiohttp import web

from fleet.errors import AccessError, FleetError, RegistryError
from fleet.operator_api.operation import (
    Operation,
    OperatorRole,
    Request,
    Response,
    SignedInOperator,
)
from fleet.server.console.api_routes import OPERATOR, check_role
from fleet.server.console.blocking_calls import BlockingCalls
from fleet.server.console.form_body import read_form
from fleet.server.console.rendering import render
from fleet.server.operations.context import OperationContext
from fleet.server.operations.local_access import LocalAccess

Result = TypeVar("Result")
PageHandler: TypeAlias = Callable[["Page"], Awaitable[web.StreamResponse]]

NOTICES: Final = {
    "changed": "The change is stored; devices follow within seconds.",
    "paused": "The roll-out is paused.",
    "resumed": "The roll-out goes on.",
    "rolled-back": "The roll-out goes back.",
    "suspended": "The identity is suspended.",
    "restored": "The identity may connect again.",
    "revoked": "The identity is revoked for good.",
    "removed": "It is removed.",
    "started": "The roll-out is started.",
    "way-back": "This roll-out brings the previous bundle back.",
    "named": "The bundle has its new name.",
    "moved": "The device has its new group.",
    "tagged": "The tags are stored.",
}
"""Texts of the notices that a page shows after a change, by the value in its address."""


@dataclass(frozen=True)
class Page:
    """A request for a page; `context` is the fleet, and `calls` are threads for its operations."""

    request: web.Request
    context: OperationContext
    calls: BlockingCalls

    @property
    def operator(self) -> SignedInOperator:
        signed_in: SignedInOperator = self.request[OPERATOR]
        return signed_in

    async def call(self, operation: Operation[Request, Response], asked: Request) -> Response:
        """Return the response of an operation. Raises FleetError, as the operation."""
        check_role(self.operator, operation)
        access = LocalAccess(self.context.acting_as(self.operator.name))
        return await self.calls.run(partial(access.call, operation, asked))

    async def form(self) -> Mapping[str, str]:
        """Return the fields of a form that was sent. Raises as `read_form`."""
        return await read_form(self.request)

    def query(self, name: str) -> str | None:
        """Return a value of the address; None if it is missing or empty."""
        return self.request.query.get(name, "").strip() or None

    def show(self, template: str, status: int = 200, **values: Any) -> web.Response:
        """Return the page."""
        return render(
            template,
            status,
            operator=self.operator,
            may_change=self.operator.role.includes(OperatorRole.OPERATOR),
            may_admit=self.operator.role.includes(OperatorRole.ADMIN),
            path=self.request.path,
            reload=self.address() if self.request.method == "GET" else None,
            now=time.time(),
            notice=NOTICES.get(self.request.query.get("notice", "")),
            **values,
        )

    def address(self, **changes: str | None) -> str:
        """Return the address of this page with some values of its query changed."""
        query = {key: value for key, value in self.request.query.items() if key != "notice"}
        query |= {key: value for key, value in changes.items() if value is not None}
        return str(self.request.rel_url.with_query(query))


def see(path: str, notice: str = "") -> web.Response:
    """Return the response to a form that was accepted: the page to show next."""
    address = f"{path}?notice={notice}" if notice else path
    return web.Response(status=303, headers={"Location": address})


async def result_of(change: Awaitable[Result]) -> tuple[Result | None, str]:
    """Wait for a change; return its result and "", or None and the message of its error.

    Raises:
        AccessError: the operator may not make this change.
        RegistryError: the registry is not usable, so no page can be shown, either.
    """
    try:
        return await change, ""
    except FleetError as error:
        if isinstance(error, AccessError) or error.code == RegistryError.code:
            raise
        return None, str(error)
