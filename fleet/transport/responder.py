"""The calls of Python programs that prompt a model, the same for an engine and for a fleet."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeAlias

from msgspec.structs import asdict

from fleet.errors import PromptError
from fleet.protocol.prompt import ChatMessage, PromptRequest, Reply, prompt_of_values
from fleet.transport.answers import Answer, AsyncAnswer
from fleet.transport.smooth_stream import async_paced, paced

SMOOTH_STREAM: Final = "smooth_stream"
MAX_AT_ONCE: Final = 4
"""Requests of a batch that are sent at a time; a device answers this many at once by default."""

Prompt: TypeAlias = str | PromptRequest
Message: TypeAlias = ChatMessage | Mapping[str, Any]


class Responder(ABC):
    """An engine, or a device of a fleet, that answers prompts.

    The options of each method are the fields of :class:`fleet.protocol.prompt.PromptRequest`, for
    example ``max_new_tokens=64, temperature=0.7, mode="verified"``. Instead of a text, a prompt may
    be such a request; options given with it replace its own. With ``smooth_stream=True`` the tokens
    of `generate` and `chat` that arrive in bursts come at a steady pace. Each method raises
    PromptError for a field that is unknown or out of range.
    """

    max_at_once: int = MAX_AT_ONCE

    @abstractmethod
    def respond(self, request: PromptRequest) -> Generator[Reply, None, None]:
        """Yield the replies to a request that is checked. Closing the generator cancels it.

        Raises:
            FleetError: the request is refused, or has failed.
        """

    def generate(self, prompt: Prompt, **options: Any) -> Answer:
        """Return the answer to a prompt, a stream that begins when it is read."""
        is_smooth = take_smooth_stream(options)
        return self._answer(request_of(prompt, options), is_smooth=is_smooth)

    def chat(self, messages: Iterable[Message], **options: Any) -> Answer:
        """Return the answer to a conversation, of messages with a `role` and a `content`."""
        is_smooth = take_smooth_stream(options)
        return self._answer(request_of_chat(messages, options), is_smooth=is_smooth)

    def _answer(self, request: PromptRequest, *, is_smooth: bool) -> Answer:
        replies = self.respond(request)
        return Answer(paced(replies) if is_smooth else replies)

    def generate_batch(self, prompts: Iterable[Prompt], **options: Any) -> list[Answer]:
        """Return the complete answers to several prompts, in their order.

        Up to `max_at_once` of them are generated at a time.

        Raises:
            FleetError: the first error; no more requests are sent then.
        """
        requests = [request_of(prompt, options) for prompt in prompts]
        with ThreadPoolExecutor(self.max_at_once) as pool:
            answers = [pool.submit(self._complete, request) for request in requests]
            try:
                return [answer.result() for answer in answers]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _complete(self, request: PromptRequest) -> Answer:
        return Answer(list(self.respond(request)))


class AsyncResponder(ABC):
    """The same calls on an event loop."""

    max_at_once: int = MAX_AT_ONCE

    @abstractmethod
    def respond(self, request: PromptRequest) -> AsyncGenerator[Reply, None]:
        """Yield the replies, as `Responder.respond` does."""

    def generate(self, prompt: Prompt, **options: Any) -> AsyncAnswer:
        """Return the answer to a prompt, a stream that begins when it is read."""
        is_smooth = take_smooth_stream(options)
        return self._answer(request_of(prompt, options), is_smooth=is_smooth)

    def chat(self, messages: Iterable[Message], **options: Any) -> AsyncAnswer:
        """Return the answer to a conversation, of messages with a `role` and a `content`."""
        is_smooth = take_smooth_stream(options)
        return self._answer(request_of_chat(messages, options), is_smooth=is_smooth)

    def _answer(self, request: PromptRequest, *, is_smooth: bool) -> AsyncAnswer:
        replies = self.respond(request)
        return AsyncAnswer(async_paced(replies) if is_smooth else replies)

    async def generate_batch(self, prompts: Iterable[Prompt], **options: Any) -> list[Answer]:
        """Return the complete answers to several prompts, in their order.

        Raises:
            FleetError: the first error; the other requests are cancelled then.
        """
        requests = [request_of(prompt, options) for prompt in prompts]
        places = asyncio.Semaphore(self.max_at_once)

        async def complete(request: PromptRequest) -> Answer:
            async with places:
                return await AsyncAnswer(self.respond(request)).complete()

        tasks = [asyncio.create_task(complete(request)) for request in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def take_smooth_stream(options: dict[str, Any]) -> bool:
    """Remove `smooth_stream`, which is no field of a request, from options. Raises PromptError."""
    value = options.pop(SMOOTH_STREAM, False)
    if not isinstance(value, bool):
        raise PromptError(f"{SMOOTH_STREAM}: expected True or False, got {value!r}")
    return value


def request_of(prompt: Prompt, options: Mapping[str, Any]) -> PromptRequest:
    """Return the request for a prompt with options. Raises PromptError."""
    fields = asdict(prompt) if isinstance(prompt, PromptRequest) else {"prompt": prompt}
    return prompt_of_values(fields | dict(options))


def request_of_chat(messages: Iterable[Message], options: Mapping[str, Any]) -> PromptRequest:
    """Return the request for a conversation with options. Raises PromptError."""
    return prompt_of_values({"messages": list(messages)} | dict(options))
