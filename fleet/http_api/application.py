"""The HTTP API as an application of aiohttp, over the backend that answers."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from contextlib import aclosing
from functools import partial
from typing import Final, TypeAlias

import msgspec
from aiohttp import web
from msgspec import Struct

from fleet.errors import (
    DecodeError,
    RefusedPromptError,
    RequestFieldError,
)
from fleet.http_api.answer_writer import AnswerWriter, ParseCall
from fleet.http_api.backend import ApiBackend, ApiCaller
from fleet.http_api.browser_guard import check_page
from fleet.http_api.chat_completions import parse_chat_completion
from fleet.http_api.model_lists import (
    OllamaShowBody,
    OllamaVersion,
    loaded_models,
    ollama_models,
    ollama_show,
    openai_model,
    openai_models,
)
from fleet.http_api.ollama_answers import parse_ollama_chat, parse_ollama_generate
from fleet.http_api.problems import Problem, checked_reply, ollama_error, openai_error
from fleet.http_api.request_body import read_whole_body
from fleet.http_api.request_fields import convert_fields, decode_object
from fleet.http_api.responses import parse_response
from fleet.http_api.text_completions import parse_text_completion
from fleet.protocol.prompt import MAX_PROMPT_BYTES, Reply
from fleet.version import __version__

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]
ErrorShape: TypeAlias = Callable[[Problem], Struct]

LOADED_S: Final = 365 * 86_400.0
BEARER: Final = re.compile(r"bearer[ \t]+(.*?)[ \t]*", re.IGNORECASE)  # RFC 9110, 11.1
NO_REQUEST: Final = (
    "expected a request of HTTP/1.1, got bytes that are none, or too large a header; correct it"
)
JSON: Final = "application/json"
STREAM_HEADERS: Final = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
OPENAI_ANSWERS: Final[dict[str, ParseCall]] = {
    "/v1/chat/completions": parse_chat_completion,
    "/v1/completions": parse_text_completion,
    "/v1/responses": parse_response,
}
OLLAMA_ANSWERS: Final[dict[str, ParseCall]] = {
    "/api/chat": parse_ollama_chat,
    "/api/generate": parse_ollama_generate,
}

log = logging.getLogger(__name__)


class HttpApi:
    """The paths of both APIs.

    The server that runs them has to cancel the handler of a client that hangs up
    (``handler_cancellation`` of aiohttp's runner): the answer is cancelled with it.
    """

    def __init__(self, backend: ApiBackend) -> None:
        self._backend = backend

    def routes(self) -> list[web.RouteDef]:
        """Return the routes; each turns its failures into errors of its API."""
        openai = partial(_guarded, shape=openai_error)
        ollama = partial(_guarded, shape=ollama_error)
        return [
            *self._answer_routes(OPENAI_ANSWERS, openai),
            *self._answer_routes(OLLAMA_ANSWERS, ollama),
            web.get("/v1/models", openai(self._openai_models)),
            web.get("/v1/models/{name:.+}", openai(self._openai_model)),
            web.get("/api/tags", ollama(self._ollama_models)),
            web.get("/api/ps", ollama(self._loaded_models)),
            web.post("/api/show", ollama(self._show)),
            web.get("/api/version", ollama(self._version)),
        ]

    def _answer_routes(
        self, paths: dict[str, ParseCall], guarded: Callable[[Handler], Handler]
    ) -> list[web.RouteDef]:
        return [
            web.post(path, guarded(partial(self._answer, parse))) for path, parse in paths.items()
        ]

    async def _caller(self, request: web.Request) -> ApiCaller:
        """Return the caller of a request. Raises CredentialsError."""
        match = BEARER.fullmatch(request.headers.get("Authorization", ""))
        return await self._backend.authenticate(match[1] if match else None)

    async def _openai_models(self, request: web.Request) -> web.Response:
        return _json(openai_models(await self._backend.models(await self._caller(request))))

    async def _openai_model(self, request: web.Request) -> web.Response:
        caller = await self._caller(request)
        return _json(openai_model(await self._backend.model(caller, request.match_info["name"])))

    async def _ollama_models(self, request: web.Request) -> web.Response:
        return _json(ollama_models(await self._backend.models(await self._caller(request))))

    async def _loaded_models(self, request: web.Request) -> web.Response:
        models = await self._backend.models(await self._caller(request))
        return _json(loaded_models(models, time.time() + LOADED_S))

    async def _show(self, request: web.Request) -> web.Response:
        caller = await self._caller(request)
        body = convert_fields(decode_object(await _read(request)), OllamaShowBody)
        name = body.model or body.name
        if not name:
            raise RequestFieldError("model", "expected the field 'model', got none; add it")
        return _json(ollama_show(await self._backend.model(caller, name)))

    async def _version(self, _: web.Request) -> web.Response:
        return _json(OllamaVersion(__version__))

    async def _answer(self, parse: ParseCall, request: web.Request) -> web.StreamResponse:
        caller = await self._caller(request)
        call = parse(await _read(request))
        await self._backend.model(caller, call.model)
        writer = call.make_writer(call.model)
        if call.prompt is None:
            return _json(writer.whole(Reply(seq=0, done=True, finish_reason="load")))
        async with aclosing(self._backend.answer(caller, call.model, call.prompt)) as replies:
            first = checked_reply(await anext(replies))
            if call.is_streamed:
                return await _stream(request, writer, first, replies)
            return _json(await _collect(writer, first, replies))


def http_application(backend: ApiBackend, hosts: Collection[str] | None = None) -> web.Application:
    """Return an application that has only this API; see `check_page` for `hosts`."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        async def checked(request: web.Request) -> web.StreamResponse:
            check_page(request.host, request.headers.get("Origin"), hosts)
            return await handler(request)

        is_ollama = request.path.startswith("/api/")
        return await _guarded(checked, ollama_error if is_ollama else openai_error)(request)

    app = web.Application(middlewares=[guard])
    app.router.add_routes(HttpApi(backend).routes())
    app.router.add_get("/", _root)
    return app


async def _root(_: web.Request) -> web.Response:
    """Answer the clients that look whether a server is there."""
    return web.Response(text="This server has the APIs of OpenAI (/v1) and Ollama (/api).")


async def _collect(
    writer: AnswerWriter, first: Reply, replies: AsyncGenerator[Reply, None]
) -> Struct:
    writer.begin(first)
    writer.add(first)
    last = first
    async for reply in replies:
        last = checked_reply(reply)
        writer.add(last)
    return writer.whole(last)


async def _stream(
    request: web.Request,
    writer: AnswerWriter,
    first: Reply,
    replies: AsyncGenerator[Reply, None],
) -> web.StreamResponse:
    response = web.StreamResponse(headers=STREAM_HEADERS)
    response.content_type = writer.content_type
    await response.prepare(request)
    try:
        await response.write(writer.begin(first) + writer.add(first))
        async for reply in replies:
            await response.write(writer.add(checked_reply(reply)))
    except ConnectionError:
        raise
    except Exception as error:  # noqa: BLE001 (the status is sent, so the stream reports it)
        await response.write(writer.fail(_problem(request, error)))
    await response.write_eof()
    return response


async def _read(request: web.Request) -> bytes:
    return await read_whole_body(request, MAX_PROMPT_BYTES, "send a shorter prompt")


def _guarded(handler: Handler, shape: ErrorShape) -> Handler:
    """Return a handler whose failures become errors of an API."""

    async def guarded(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except ConnectionError:
            raise
        except web.HTTPException as error:
            response = _error_response(shape, _no_route(request, error))
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
            return response
        except Exception as error:  # noqa: BLE001 (a failed request must not end the program)
            return _error_response(shape, _problem(request, error))

    return guarded


def _no_route(request: web.Request, error: web.HTTPException) -> Problem:
    """Return the problem of a request that aiohttp refuses, such as one to an unknown path."""
    message = f"{request.method} {request.path[:200]}: {error.reason}; docs/api.md has the paths"
    return Problem(status=error.status, code="no_path", message=message)


def _problem(request: web.Request, error: Exception) -> Problem:
    problem = Problem.of(error)
    if problem.status == 500 and not isinstance(error, RefusedPromptError):  # the device logs that
        log.error("%s %s failed", request.method, request.path, exc_info=error)
    return problem


def api_refusal(status: int) -> web.Response:
    """Return the response to bytes that are no request of HTTP, or to a failure (status 500)."""
    if status >= 500:
        return _error_response(openai_error, Problem.of(RuntimeError()))
    problem = Problem(status=status, code=DecodeError.code, message=NO_REQUEST)
    return _error_response(openai_error, problem)


def _error_response(shape: ErrorShape, problem: Problem) -> web.Response:
    response = web.Response(
        status=problem.status, body=msgspec.json.encode(shape(problem)), content_type=JSON
    )
    response.headers.update(problem.headers)
    return response


def _json(value: Struct) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type=JSON)
