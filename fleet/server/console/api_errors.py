"""Errors of the operators' API as statuses and bodies."""

from __future__ import annotations

import logging
import math
from typing import Final

import msgspec
from aiohttp import web
from msgspec import Struct

from fleet.errors import FleetError, RegistryError
from fleet.utils.rate_limited_log import RateLimitedLog

STATUS: Final = {
    "bad_config": 400,
    "bad_prompt": 400,
    "bad_topic": 400,
    "protocol": 400,
    "undecodable": 400,
    "value_refused": 400,
    "bad_credentials": 401,
    "not_allowed": 403,
    "no_path": 404,
    "unknown_device": 404,
    "unknown_rollout": 404,
    "bad_bundle": 409,
    "bad_identity": 409,
    "bad_rollout": 409,
    "bad_software": 409,
    "bad_state": 409,
    "oversized": 413,
    "busy": 429,
    "link": 503,
    "offline": 503,
    "registry": 503,
    "service": 503,
    "service_away": 503,
    "deadline": 504,
}
"""The status of each error by its code; 500 for others."""

RETRY_S: Final = 1.0
INTERNAL: Final = "the server failed on this request; see its log"
REGISTRY_AWAY: Final = (
    "the fleet's registry cannot be used now; the server's log has the cause. Try again later"
)
"""The text of a registry's own error has its path or its address, which operators do not learn."""

JSON: Final = "application/json"

log = logging.getLogger(__name__)
warnings = RateLimitedLog(log)


class ApiProblem(Struct, frozen=True, kw_only=True):
    """An error: its code, and a message with the expected and the actual value."""

    code: str
    message: str


class ApiProblemBody(Struct, frozen=True, kw_only=True):
    """The body of a response that failed."""

    error: ApiProblem


def problem_response(error: Exception) -> web.Response:
    """Return the response for an error. That of an unexpected one is in the log alone."""
    if isinstance(error, web.HTTPException):
        return _of_path(error)
    if not isinstance(error, FleetError):
        log.error("a request of an operator failed", exc_info=error)
        return problem_body(500, "internal", INTERNAL)
    status = STATUS.get(error.code, 500)
    response = problem_body(status, error.code, message_of(error))
    if status in (429, 503):
        retry_after_s = getattr(error, "retry_after_s", None) or RETRY_S
        response.headers["Retry-After"] = str(math.ceil(retry_after_s))
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def message_of(error: FleetError) -> str:
    """Return the text of an error for an operator; the log has that of the registry."""
    if error.code != RegistryError.code:
        return str(error)
    warnings.warning("a request of an operator failed: %s", error)
    return REGISTRY_AWAY


def _of_path(error: web.HTTPException) -> web.Response:
    """Return the response to a request that aiohttp refuses, such as one to an unknown path."""
    response = problem_body(error.status, "no_path", f"{error.reason}; see docs/operator-api.json")
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


def problem_body(status: int, code: str, message: str) -> web.Response:
    """Return a response with an error."""
    body = ApiProblemBody(error=ApiProblem(code=code, message=message))
    return json_response(msgspec.json.encode(body), status)


def json_response(body: bytes, status: int = 200) -> web.Response:
    """Return a response with JSON that no cache may keep."""
    return web.Response(
        body=body,
        status=status,
        content_type=JSON,
        headers={"Cache-Control": "no-store"},
    )
