"""Errors as statuses and bodies of each API."""

from __future__ import annotations

import pytest

from fleet.errors import (
    AccessError,
    BusyError,
    CredentialsError,
    DeadlineError,
    OversizedError,
    PromptError,
    RefusedPromptError,
    RegistryError,
    RequestFieldError,
    UnknownModelError,
)
from fleet.http_api.problems import Problem, checked_reply, ollama_error, openai_error
from fleet.protocol.prompt import ErrorInfo, Reply


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (PromptError("x"), 400, "invalid_request_error", "bad_prompt"),
        (RequestFieldError("n", "x"), 400, "invalid_request_error", "bad_prompt"),
        (CredentialsError("x"), 401, "authentication_error", "invalid_api_key"),
        (AccessError("x"), 403, "permission_error", "not_allowed"),
        (UnknownModelError("x"), 404, "invalid_request_error", "model_not_found"),
        (OversizedError("x"), 413, "invalid_request_error", "oversized"),
        (BusyError("x"), 429, "rate_limit_error", "rate_limit_exceeded"),
        (RefusedPromptError("x", "busy"), 429, "rate_limit_error", "rate_limit_exceeded"),
        (RefusedPromptError("x", "no_cloud"), 503, "server_error", "no_cloud"),
        (DeadlineError("x"), 504, "server_error", "deadline"),
    ],
)
def test_an_error_has_the_status_and_the_body_of_its_api(
    error: Exception, status: int, kind: str, code: str
) -> None:
    problem = Problem.of(error)
    body = openai_error(problem).error
    assert problem.status == status
    assert (body.type, body.code, body.message) == (kind, code, "x")
    assert ollama_error(problem).error == "x"
    assert ("Retry-After" in problem.headers) == (status in (429, 503))


@pytest.mark.parametrize("code", ["internal", "zzz", "bad_credentials", "unknown_model"])
def test_a_device_does_not_decide_on_keys_and_names(code: str) -> None:
    problem = Problem.of(RefusedPromptError("x", code))
    assert (problem.status, problem.code, problem.message) == (500, "internal", "x")
    assert problem.headers == {}


def test_an_error_knows_its_field_and_its_wait() -> None:
    assert openai_error(Problem.of(RequestFieldError("n", "x"))).error.param == "n"
    assert openai_error(Problem.of(UnknownModelError("x"))).error.param == "model"
    busy = BusyError("x")
    busy.retry_after_s = 2.5  # type: ignore[attr-defined]
    assert Problem.of(busy).headers == {"Retry-After": "3"}


@pytest.mark.parametrize("error", [ValueError("secret"), RegistryError("secret")])
def test_the_text_of_an_unexpected_error_is_not_sent(error: Exception) -> None:
    problem = Problem.of(error)
    assert problem.status == 500
    assert "secret" not in problem.message


def test_a_reply_with_an_error_or_of_a_stopped_answer_is_an_error() -> None:
    assert checked_reply(Reply(seq=0, text="a")).text == "a"
    with pytest.raises(RefusedPromptError) as refused:
        checked_reply(Reply(seq=0, done=True, error=ErrorInfo("busy", "x")))
    assert refused.value.code == "busy"
    with pytest.raises(RefusedPromptError, match="stopped"):
        checked_reply(Reply(seq=0, done=True, finish_reason="cancelled"))
