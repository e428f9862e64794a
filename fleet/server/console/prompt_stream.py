"""The answer to an operator's prompt as a stream of server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any, Final

import msgspec
from aiohttp import web
from msgspec import Struct

from fleet.errors import BusyError, DecodeError, FleetError, PromptError, RegistryError
from fleet.http_api.answer_writer import EVENT_STREAM
from fleet.http_api.request_body import read_whole_body
from fleet.operator_api.operation import PREFIX, SignedInOperator
from fleet.operator_api.prompt_operation import PROBLEM, PROMPT_DEVICE, REPLY
from fleet.protocol.prompt import MAX_PROMPT_BYTES, PromptRequest, Reply, prompt_of_fields
from fleet.server.console.api_errors import JSON, ApiProblem, problem_response
from fleet.server.console.api_routes import OPERATOR, SIGN_IN_CHECK, check_role
from fleet.server.console.operator_prompts import OperatorPrompts
from fleet.transport.async_prompt_client import AsyncReplyStream
from fleet.transport.prompt_client import reply_timeout_s
from fleet.utils.json_text import parse_json
from fleet.utils.validation import JSON_ERRORS

CHECK_S: Final = 5.0
"""The time after which a stream without replies shows that it lives, and checks the sign-in."""
FIRST_S: Final = 15.0
"""The time after which a stream begins without a reply; proxies cut connections that are silent."""
WRITE_S: Final = 60.0
STREAM_HEADERS: Final = {
    "Content-Type": EVENT_STREAM,
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",
}
STILL_ALIVE: Final = b": waiting\n\n"


class PromptStream:
    """The route of operators' prompts.

    An earlier middleware has authenticated the request. An answer ends with the sign-in of its
    operator.
    """

    def __init__(self, prompts: OperatorPrompts, check_s: float = CHECK_S) -> None:
        self._prompts = prompts
        self._check_s = check_s

    def routes(self) -> list[web.RouteDef]:
        """Return the route."""
        return [web.post(PREFIX + PROMPT_DEVICE.path, self._answer)]

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        try:
            operator: SignedInOperator = request[OPERATOR]
            check_role(operator, PROMPT_DEVICE)
            prompt = await read_prompt(request)
            device = request.match_info["device"]
            async with self._prompts.asked(operator.name, device, prompt) as stream:
                reply_s = reply_timeout_s(prompt)
                first = asyncio.create_task(stream.next(reply_s))
                try:
                    await asyncio.wait({first}, timeout=FIRST_S)
                    if first.done():
                        first.result()  # an error until then has a status of its own
                    return await self._stream(request, stream, first, reply_s)
                finally:
                    first.cancel()
        except ConnectionError:
            raise
        except Exception as error:  # noqa: BLE001 (a failed request must not end the program)
            return problem_response(error)

    async def _stream(
        self,
        request: web.Request,
        stream: AsyncReplyStream,
        first: Awaitable[Reply],
        reply_s: float,
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers=STREAM_HEADERS)
        await response.prepare(request)
        watch = asyncio.create_task(self._watch(request, response, stream))
        try:
            await _write(response, event_of(REPLY, await first))
            while not stream.is_done:
                await _write(response, event_of(REPLY, await stream.next(reply_s)))
        except FleetError as error:  # the status is sent, so the stream reports it
            problem = ApiProblem(code=error.code, message=str(error))
            await _write(response, event_of(PROBLEM, problem))
        finally:
            watch.cancel()
        await response.write_eof()
        return response

    async def _watch(
        self, request: web.Request, response: web.StreamResponse, stream: AsyncReplyStream
    ) -> None:
        """Show that a quiet stream lives, and end it with the sign-in of its operator."""
        try:
            while True:
                await asyncio.sleep(self._check_s)
                with suppress(ConnectionError, BusyError, RegistryError):
                    check_role(await request[SIGN_IN_CHECK](), PROMPT_DEVICE)
                    await response.write(STILL_ALIVE)
        except FleetError as error:
            stream.fail(error)


async def _write(response: web.StreamResponse, event: bytes) -> None:
    """Write an event. Raises ConnectionResetError if its reader takes too long."""
    try:
        async with asyncio.timeout(WRITE_S):
            await response.write(event)
    except TimeoutError:
        raise ConnectionResetError("the reader of an answer does not read") from None


async def read_prompt(request: web.Request) -> PromptRequest:
    """Return the prompt of a request's body; by default a streamed answer has a trace.

    Raises:
        DecodeError, OversizedError, PromptError: the body is not usable.
    """
    if request.content_type != JSON:
        raise DecodeError(
            f"expected a body of the type {JSON}, got {request.content_type[:80]!r}; set the "
            "header Content-Type"
        )
    body = await read_whole_body(request, MAX_PROMPT_BYTES, "send a shorter prompt")
    try:
        fields = parse_json(body, dict[str, Any])
    except JSON_ERRORS as error:
        raise PromptError(f"expected a JSON object with 'prompt' or 'messages': {error}") from None
    return prompt_of_fields({"trace": fields.get("stream", True)} | fields)


def event_of(name: str, value: Struct) -> bytes:
    """Return an event; JSON has no line breaks."""
    return b"event: %s\ndata: %s\n\n" % (name.encode(), msgspec.json.encode(value))
