"""The playground: an answer under glass, live with a script, else as a finished page."""

from __future__ import annotations

from typing import Any, Final, Self
from urllib.parse import parse_qsl

from aiohttp import web
from msgspec import Struct
from msgspec.structs import replace

from fleet.errors import DecodeError, FleetError
from fleet.http_api.request_body import read_whole_body
from fleet.operator_api.device_operations import LIST_DEVICES, DeviceQuery
from fleet.operator_api.operation import SignedInOperator
from fleet.operator_api.prompt_operation import PROMPT_DEVICE
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import MAX_PROMPT_BYTES, PromptRequest, Reply, prompt_of_fields
from fleet.server.console.answer_picture import AnswerPicture
from fleet.server.console.api_routes import OPERATOR, check_role
from fleet.server.console.blocking_calls import BlockingCalls
from fleet.server.console.operator_prompts import OperatorPrompts
from fleet.server.console.pages.page import Page
from fleet.server.console.prompt_stream import PromptStream
from fleet.server.operations.context import OperationContext
from fleet.transport.base import Transport
from fleet.utils.text import is_blank

PATH: Final = "/playground"
FORM: Final = "application/x-www-form-urlencoded"
MAX_FIELDS: Final = 20
SHOWN_DEVICES: Final = 200
DEFAULT_TOKENS: Final = "64"
MODES: Final = tuple(mode.value for mode in Mode)


class PlaygroundForm(Struct, frozen=True, kw_only=True):
    """The fields of the form, as texts."""

    device: str = ""
    mode: str = Mode.COLLABORATIVE.value
    prompt: str = ""
    max_new_tokens: str = DEFAULT_TOKENS

    def request(self) -> PromptRequest:
        """Return the prompt. Raises PromptError if a field is not usable."""
        limit = self.max_new_tokens
        fields: dict[str, Any] = {"prompt": self.prompt, "trace": True}
        fields |= {"mode": self.mode} if self.mode else {}
        fields |= {"max_new_tokens": int(limit) if limit.isdecimal() else limit} if limit else {}
        return prompt_of_fields(fields)


class Playground:
    """The pages and the stream of the playground, as a context manager around all answers.

    `transport` has the rights of a gateway.
    """

    def __init__(self, transport: Transport) -> None:
        self._prompts = OperatorPrompts(transport)

    def __enter__(self) -> Self:
        self._prompts.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._prompts.__exit__(*error)

    def routes(self, context: OperationContext, calls: BlockingCalls) -> list[web.RouteDef]:
        """Return the routes of the pages and of the stream."""
        pages = PlaygroundPages(self._prompts, context, calls)
        return [*pages.routes(), *PromptStream(self._prompts).routes()]


class PlaygroundPages:
    """The pages: the form, and its answer for browsers without a script."""

    def __init__(
        self, prompts: OperatorPrompts, context: OperationContext, calls: BlockingCalls
    ) -> None:
        self._prompts = prompts
        self._context = context
        self._calls = calls

    def routes(self) -> list[web.RouteDef]:
        """Return the routes."""
        return [web.get(PATH, self._show), web.post(PATH, self._answer)]

    async def _show(self, request: web.Request) -> web.Response:
        operator: SignedInOperator = request[OPERATOR]
        check_role(operator, PROMPT_DEVICE)
        form = PlaygroundForm(device=request.query.get("device", ""))
        return await self._page(request, form)

    async def _answer(self, request: web.Request) -> web.Response:
        operator: SignedInOperator = request[OPERATOR]
        check_role(operator, PROMPT_DEVICE)
        form = await _read_form(request)
        try:
            prompt = form.request()
            async with self._prompts.asked(operator.name, form.device, prompt) as stream:
                replies: list[Reply] = []
                while not stream.is_done:
                    replies.append(await stream.next())
        except FleetError as error:
            return await self._page(request, form, problem=str(error))
        return await self._page(request, form, answer=AnswerPicture.of(replies))

    async def _page(
        self,
        request: web.Request,
        form: PlaygroundForm,
        answer: AnswerPicture | None = None,
        problem: str = "",
    ) -> web.Response:
        page = Page(request, self._context, self._calls)
        query = DeviceQuery(online=True, limit=SHOWN_DEVICES)
        devices = [row.device for row in (await page.call(LIST_DEVICES, query)).devices]
        if is_blank(form.device) and devices:
            form = replace(form, device=devices[0])
        return page.show(
            "playground.html",
            devices=devices,
            modes=MODES,
            form=form,
            answer=answer,
            problem=problem,
        )


async def _read_form(request: web.Request) -> PlaygroundForm:
    """Return the form that a browser sends; unknown fields are ignored.

    Raises:
        OversizedError, DecodeError: the body is too large, malformed, or does not arrive in time.
    """
    if request.content_type != FORM:
        raise DecodeError(f"expected a form, got {request.content_type[:80]!r}; use the page's own")
    body = await read_whole_body(request, 4 * MAX_PROMPT_BYTES, "send a shorter prompt")
    try:
        fields = dict(parse_qsl(body.decode(), max_num_fields=MAX_FIELDS))
    except ValueError:
        raise DecodeError("expected the fields of the form; load the page again") from None
    names = PlaygroundForm.__struct_fields__
    return PlaygroundForm(**{name: fields[name] for name in names if name in fields})
