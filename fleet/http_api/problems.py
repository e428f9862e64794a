"""Errors of an answer as HTTP statuses, and as the bodies that each API has for them."""

from __future__ import annotations

import math
from typing import Final, Literal

from msgspec import Struct

from fleet.errors import FleetError, RefusedPromptError, RequestFieldError, UnknownModelError
from fleet.protocol.prompt import Reply

STATUS: Final = {
    "bad_prompt": 400,
    "undecodable": 400,
    "protocol": 400,
    "bad_credentials": 401,
    "not_allowed": 403,
    "unknown_model": 404,
    "no_path": 404,
    "oversized": 413,
    "busy": 429,
    "link": 503,
    "memory": 503,
    "no_cloud": 503,
    "offline": 503,
    "cancelled": 503,
    "deadline": 504,
}
"""The status of each error by its code; 500 for others."""

CLIENT_STATUSES: Final = (401, 403, 404)
"""Statuses of keys and names, which the API alone decides, whatever code a device sends."""

RETRY_S: Final = 1.0
"""Seconds after which a client may repeat a request that failed only because of its time."""

ErrorType = Literal[
    "invalid_request_error", "authentication_error", "permission_error", "rate_limit_error",
    "server_error",
]  # fmt: skip
ERROR_TYPES: Final[dict[int, ErrorType]] = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
OPENAI_CODES: Final = {
    "bad_credentials": "invalid_api_key",
    "busy": "rate_limit_exceeded",
    "unknown_model": "model_not_found",
}
INTERNAL: Final = "the program failed on this request; see its log"


class Problem(Struct, frozen=True, kw_only=True):
    """An error as both APIs need it; `field` is the field of the request that caused it."""

    status: int
    code: str
    message: str
    field: str | None = None
    retry_after_s: float | None = None

    @classmethod
    def of(cls, error: Exception) -> Problem:
        """Return the problem of an error. The message of an unexpected one stays in the log."""
        status = STATUS.get(error.code) if isinstance(error, FleetError) else None
        if isinstance(error, RefusedPromptError) and status in (None, *CLIENT_STATUSES):
            return cls(status=500, code="internal", message=str(error))
        if status is None or not isinstance(error, FleetError):
            return cls(status=500, code="internal", message=INTERNAL)
        retry_after_s = RETRY_S if status in (429, 503) else None
        return cls(
            status=status,
            code=error.code,
            message=str(error),
            field=_field(error),
            retry_after_s=getattr(error, "retry_after_s", None) or retry_after_s,
        )

    @property
    def headers(self) -> dict[str, str]:
        """The headers of a response, beyond those of its body."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": str(math.ceil(self.retry_after_s))}


def _field(error: FleetError) -> str | None:
    if isinstance(error, RequestFieldError):
        return error.field
    return "model" if isinstance(error, UnknownModelError) else None


class OpenAiError(Struct, frozen=True, kw_only=True):
    """An error of OpenAI's API."""

    message: str
    type: ErrorType
    param: str | None
    code: str | None


class OpenAiErrorBody(Struct, frozen=True):
    """The body of a response of OpenAI's API that failed."""

    error: OpenAiError


class OllamaErrorBody(Struct, frozen=True):
    """The body of a response of Ollama's API that failed."""

    error: str


def openai_error(problem: Problem) -> OpenAiErrorBody:
    """Return a problem as OpenAI's API has it."""
    fallback: ErrorType = "invalid_request_error" if problem.status < 500 else "server_error"
    error = OpenAiError(
        message=problem.message,
        type=ERROR_TYPES.get(problem.status, fallback),
        param=problem.field,
        code=OPENAI_CODES.get(problem.code, problem.code),
    )
    return OpenAiErrorBody(error)


def ollama_error(problem: Problem) -> OllamaErrorBody:
    """Return a problem as Ollama's API has it."""
    return OllamaErrorBody(problem.message)


def checked_reply(reply: Reply) -> Reply:
    """Return a reply that is no error.

    Raises:
        RefusedPromptError: the device refused the prompt, or its answer failed or was stopped.
    """
    if reply.error:
        raise RefusedPromptError(reply.error.message, reply.error.code)
    if reply.finish_reason == "cancelled":
        raise RefusedPromptError("the answer was stopped; send the prompt again", "cancelled")
    return reply
