"""The answers of one device for its HTTP API, from the queue that the fleet's prompts use, too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Final

from edge_agent.local_api.api_keys import ApiKeys
from edge_agent.serving.agent import Agent
from edge_agent.serving.request_planner import MAX_WAIT_S, late_answer
from fleet.errors import BusyError, UnknownModelError
from fleet.http_api.backend import LATEST, ApiBackend, ApiCaller, ApiModel
from fleet.protocol.prompt import PromptRequest, Reply, decode_reply

LOCAL: Final = ApiCaller("local")
"""The caller of all clients of the API in reports, and in the order of the queue."""


class DeviceBackend(ApiBackend):
    """The backend of a device. `find_agent` returns its agent, or None while there is none."""

    def __init__(self, find_agent: Callable[[], Agent | None], keys: ApiKeys) -> None:
        self._find_agent = find_agent
        self._keys = keys

    async def authenticate(self, key: str | None) -> ApiCaller:
        self._keys.check(key)
        return LOCAL

    async def models(self, caller: ApiCaller) -> Sequence[ApiModel]:
        del caller  # all use the same model
        return [_model(self._agent())]

    async def model(self, caller: ApiCaller, name: str) -> ApiModel:
        (model,) = await self.models(caller)
        if name.removesuffix(LATEST) not in (model.name, self._agent().name):
            raise UnknownModelError(
                f"model {name[:200]!r} not found: this device serves {model.name!r}"
            )
        return model

    async def answer(
        self, caller: ApiCaller, model: str, prompt: PromptRequest
    ) -> AsyncGenerator[Reply, None]:
        await self.model(caller, model)
        replies: asyncio.Queue[bytes] = asyncio.Queue()
        agent = self._agent()
        put = partial(_put_from_thread, asyncio.get_running_loop(), replies)
        job = agent.submit(caller.app, prompt, put)
        is_done = False
        try:
            while not is_done:
                reply = decode_reply(await _next(replies))
                is_done = reply.done
                yield reply
        finally:
            if not is_done:
                agent.cancel(job)

    def _agent(self) -> Agent:
        agent = self._find_agent()
        if agent is None:
            raise BusyError("this device is changing its model; try again in a moment")
        return agent


async def _next(replies: asyncio.Queue[bytes]) -> bytes:
    """Return the next reply. Raises DeadlineError."""
    try:
        return await asyncio.wait_for(replies.get(), MAX_WAIT_S)
    except TimeoutError:
        raise late_answer() from None


def _put_from_thread(
    loop: asyncio.AbstractEventLoop, replies: asyncio.Queue[bytes], payload: bytes
) -> None:
    with suppress(RuntimeError):  # the loop is closed, as when the device stops
        loop.call_soon_threadsafe(replies.put_nowait, payload)


def _model(agent: Agent) -> ApiModel:
    manifest = agent.manifest
    return ApiModel(
        name=manifest.model.name,
        created_at=agent.started_at,
        bundle_id=manifest.bundle_id,
        architecture=manifest.model.architecture,
        quantization=manifest.quantization,
        num_bytes=sum(entry.num_bytes for entry in manifest.files),
        max_positions=agent.max_positions,
        has_chat_template=manifest.prompt_format == "chat",
    )
