"""Which status an error is, and how it looks on the wire."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import msgspec
from aiohttp import web

from fleet.errors import (
    AccessError,
    BundleError,
    BusyError,
    CredentialsError,
    CsrError,
    DecodeError,
    ExpiredTokenError,
    FleetError,
    OversizedError,
    ProtocolError,
    RegistryError,
    StateError,
    TokenNameError,
    UnknownTokenError,
    UsedTokenError,
)
from fleet.protocol.enrolment_api import ServiceProblem

# The first that fits.
STATUS: Final[tuple[tuple[type[FleetError], int], ...]] = (
    (OversizedError, 413),
    (DecodeError, 400),
    (CsrError, 400),
    (UnknownTokenError, 401),
    (CredentialsError, 401),
    (StateError, 403),
    (AccessError, 403),
    (BundleError, 404),
    (TokenNameError, 409),
    (UsedTokenError, 410),
    (ExpiredTokenError, 410),
    (BusyError, 429),
    (RegistryError, 503),
)
UNAVAILABLE: Final = "the registry cannot answer now; ask again later"


def status_of(error: FleetError) -> int:
    """500 for an error that nobody should see out there."""
    return next((status for kind, status in STATUS if isinstance(error, kind)), 500)


def problem(error: FleetError, retry_after_s: float | None = None) -> web.Response:
    """The reply to a request that failed. What the registry says of itself stays in here."""
    status = status_of(error)
    message = (
        str(error)
        if status < 500
        else UNAVAILABLE
        if status == 503
        else "the server failed; see its log"
    )
    headers = {} if retry_after_s is None else {"Retry-After": str(math.ceil(retry_after_s))}
    return _reply(status, error.code, message, headers)


def http_problem(error: web.HTTPException) -> web.Response:
    """The same for what aiohttp refuses: no such path, another method, a body that is too large."""
    if error.status == 413:
        return problem(OversizedError(error.text or "the body is too large"))
    headers = {name: value for name, value in error.headers.items() if name == "Allow"}
    return _reply(
        error.status,
        ProtocolError.code,
        f"{error.status} {error.reason}; see docs/protocol.md",
        headers,
    )


def _reply(status: int, code: str, message: str, headers: Mapping[str, str]) -> web.Response:
    body = msgspec.json.encode(ServiceProblem(code, message))
    return web.Response(status=status, body=body, content_type="application/json", headers=headers)
