"""HTTP responses of errors: the status of each, and the body."""

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
    SoftwareError,
    StateError,
    TokenNameError,
    UnknownTokenError,
    UsedTokenError,
)
from fleet.protocol.enrolment_api import ServiceProblem

# The first entry that matches counts.
STATUS: Final[tuple[tuple[type[FleetError], int], ...]] = (
    (OversizedError, 413),
    (DecodeError, 400),
    (CsrError, 400),
    (UnknownTokenError, 401),
    (CredentialsError, 401),
    (StateError, 403),
    (AccessError, 403),
    (BundleError, 404),
    (SoftwareError, 404),
    (TokenNameError, 409),
    (UsedTokenError, 410),
    (ExpiredTokenError, 410),
    (BusyError, 429),
    (RegistryError, 503),
)
UNAVAILABLE: Final = "the registry is not available now; try again later"


def status_of(error: FleetError) -> int:
    """Return the HTTP status of an error; 500 for an error that clients must not see."""
    return next((status for kind, status in STATUS if isinstance(error, kind)), 500)


def error_response(error: FleetError, retry_after_s: float | None = None) -> web.Response:
    """Return the response to a request that failed. Messages of the registry are not sent out."""
    status = status_of(error)
    message = str(error)
    if status >= 500:
        message = UNAVAILABLE if status == 503 else "the server failed; see its log"
    headers = {} if retry_after_s is None else {"Retry-After": str(math.ceil(retry_after_s))}
    return _json_response(status, error.code, message, headers)


def http_error_response(error: web.HTTPException) -> web.Response:
    """Return the response to a request that aiohttp refuses: bad path, method or body size."""
    if error.status == 413:
        return error_response(OversizedError(error.text or "the body is too large"))
    headers = {name: value for name, value in error.headers.items() if name == "Allow"}
    message = f"{error.status} {error.reason}; see docs/protocol.md"
    return _json_response(error.status, ProtocolError.code, message, headers)


def _json_response(
    status: int, code: str, message: str, headers: Mapping[str, str]
) -> web.Response:
    body = msgspec.json.encode(ServiceProblem(code, message))
    return web.Response(status=status, body=body, content_type="application/json", headers=headers)
