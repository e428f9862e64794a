"""The interface between the application and the endpoints that answer prompts."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeAlias

import msgspec
from msgspec import Struct

from fleet.http_api.problems import Problem
from fleet.protocol.prompt import Choice, PromptRequest, Reply, TokenLogprob

EVENT_STREAM: Final = "text/event-stream"
JSON_LINES: Final = "application/x-ndjson"


class AnswerWriter(ABC):
    """The bytes of one answer in the shape of an API, as a stream or as one object.

    `model` is the name that the client sent. Call `begin` with the first reply, then `add` with
    every reply, the first one included.
    """

    content_type: ClassVar[str]

    def __init__(self, model: str) -> None:
        self.model = model
        self.created_at = time.time()
        self.generation: str | None = None
        self.id = uuid.uuid4().hex
        self.num_characters = 0
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._texts)

    def begin(self, reply: Reply) -> bytes:
        """Return the bytes before those of the first reply."""
        self.generation = reply.generation
        self.id = reply.generation or self.id
        return b""

    def add(self, reply: Reply) -> bytes:
        """Return the bytes of the next reply, and of the end of the stream after the last one."""
        self._texts.append(reply.text)
        self.num_characters += len(reply.text)
        self._logprobs += reply.logprobs or ()
        return self._last(reply) if reply.done else self._chunk(reply)

    def _choices(self, last_reply: Reply) -> tuple[Choice, ...]:
        """Return the whole answers: several, or the one that has come in pieces."""
        only = Choice(
            index=0,
            full_text=self.text,
            finish_reason=last_reply.finish_reason or "",
            logprobs=tuple(self._logprobs) or None,
        )
        return last_reply.choices or (only,)

    @abstractmethod
    def _chunk(self, reply: Reply) -> bytes:
        """Return the bytes of a reply that is not the last one."""

    @abstractmethod
    def _last(self, reply: Reply) -> bytes:
        """Return the bytes of the last reply and of the end of the stream."""

    @abstractmethod
    def whole(self, reply: Reply) -> Struct:
        """Return the whole answer as one object; `reply` is the last one."""

    @abstractmethod
    def fail(self, problem: Problem) -> bytes:
        """Return the last bytes of a stream that fails."""


@dataclass(frozen=True, kw_only=True)
class AnswerCall:
    """A request for an answer, translated. `prompt` is None if the client sent no text on purpose,
    as to load a model; the answer is empty then.
    """

    model: str
    prompt: PromptRequest | None
    is_streamed: bool
    make_writer: Callable[[str], AnswerWriter]


ParseCall: TypeAlias = Callable[[bytes], AnswerCall]


def event(value: Struct | Mapping[str, Any]) -> bytes:
    """Return a server-sent event with a value as JSON."""
    return b"data: %b\n\n" % msgspec.json.encode(value)


def json_line(value: Struct) -> bytes:
    """Return a value as one line of JSON."""
    return msgspec.json.encode(value) + b"\n"
