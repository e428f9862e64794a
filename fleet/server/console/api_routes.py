"""The API of operators over HTTP: a route for each operation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

import msgspec
from aiohttp import web
from msgspec import Struct

from fleet.errors import AccessError, CredentialsError, DecodeError
from fleet.http_api.request_body import read_whole_body
from fleet.operator_api.catalogue import OPERATIONS
from fleet.operator_api.operation import PREFIX, Operation, SignedInOperator
from fleet.operator_api.request_codec import decode_request
from fleet.server.console.api_errors import JSON, json_response, problem_body, problem_response
from fleet.server.console.blocking_calls import BlockingCalls
from fleet.server.operations.context import OperationContext
from fleet.server.operations.local_access import LocalAccess

MAX_BODY_BYTES: Final = 2 << 20  # 10,000 enrolments
OPERATOR: Final[Any] = getattr(web, "RequestKey", lambda name, _: name)(
    "operator", SignedInOperator
)
"""The key of a request under which the authentication has put a `SignedInOperator`.

aiohttp has keys of this kind since 3.14, and warns of a text; before, a key is a text.
"""

SIGN_IN_CHECK: Final[Any] = getattr(web, "RequestKey", lambda name, _: name)(
    "sign_in_check", Callable[[], Awaitable[SignedInOperator]]
)
"""The key under which it has put a function that authenticates the request again."""


class OperatorApi:
    """The routes of all operations.

    An earlier middleware has authenticated each request. Changes are those of its operator.
    """

    def __init__(self, context: OperationContext, calls: BlockingCalls) -> None:
        self._context = context
        self._calls = calls

    def routes(self) -> list[web.RouteDef]:
        """Return a route for each operation; it turns failures into errors of the API."""
        return [
            web.route(each.method, PREFIX + each.path, partial(self._answer, each))
            for each in OPERATIONS
        ]

    async def _answer(self, operation: Operation[Any, Any], request: web.Request) -> web.Response:
        try:
            return await self._call(operation, request)
        except ConnectionError:
            raise
        except Exception as error:  # noqa: BLE001 (a failed request must not end the program)
            return problem_response(error)

    async def _call(self, operation: Operation[Any, Any], request: web.Request) -> web.Response:
        operator: SignedInOperator = request[OPERATOR]
        check_role(operator, operation)
        asked = await read_request(operation, request)
        access = LocalAccess(self._context.acting_as(operator.name))
        try:
            body = await self._calls.run(partial(_encoded_response, access, operation, asked))
        except CredentialsError as error:  # of a key that does not exist, not of the operator
            return problem_body(404, error.code, str(error))
        return json_response(body)


def _encoded_response(
    access: LocalAccess, operation: Operation[Any, Any], request: Struct
) -> bytes:
    """Return a response as JSON: on the thread that made it, because a long list takes time."""
    return msgspec.json.encode(access.call(operation, request))


def check_role(operator: SignedInOperator, operation: Operation[Any, Any]) -> None:
    """Raise AccessError unless the operator has the role that an operation needs."""
    if not operator.role.includes(operation.role):
        raise AccessError(
            f"{operator.name} is {operator.role}; this needs the role {operation.role}: ask an "
            "admin of the fleet"
        )


async def read_request(operation: Operation[Any, Any], request: web.Request) -> Struct:
    """Return the request of an operation.

    Raises:
        ConfigError, DecodeError, OversizedError: a field or the body is not usable.
    """
    body = b""
    if operation.has_body:
        if request.content_type != JSON:
            raise DecodeError(
                f"expected a body of the type {JSON}, got {request.content_type[:80]!r}; set the "
                "header Content-Type"
            )
        body = await read_whole_body(request, MAX_BODY_BYTES, "send less at once")
    asked: Struct = decode_request(operation, request.match_info, request.query.items(), body)
    return asked
