"""A device's transport whose app is on the device: prompts and replies stay here, all else goes over the link."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Final, Self

import msgspec

from edge_agent.serving.agent import prompts_of
from fleet.errors import FleetError
from fleet.protocol import topics
from fleet.protocol.codec import decode_to_worker
from fleet.protocol.messages import Verify
from fleet.protocol.prompt import PromptRequest, Reply, decode_reply
from fleet.transport.base import Handler, Transport

APP: Final = "app"
REPLY_TIMEOUT_S: Final = 120.0  # from one reply to the next


class LocalApp(Transport):
    """Wraps a device's transport, and counts the messages that it carries."""

    def __init__(self, link: Transport) -> None:
        self.name = link.name
        self.messages_up = self.messages_down = 0
        self._link = link
        self._on_prompt: Handler | None = None
        self._replies: queue.Queue[bytes] = queue.Queue()
        self._questions: list[bytes] = []
        self._num_asked = 0

    def ask(self, request: PromptRequest) -> Iterator[Reply]:
        """Replies as they come, the last of which is done.

        Raises:
            FleetError: the agent refuses it, or says nothing for `REPLY_TIMEOUT_S` seconds.
        """
        if self._on_prompt is None:
            raise FleetError(f"{self.name} takes no prompts; start its agent first")
        self._num_asked += 1
        self._on_prompt(
            topics.prompt(self.name, APP, f"r{self._num_asked}"), msgspec.json.encode(request)
        )
        while True:
            try:
                reply = decode_reply(self._replies.get(timeout=REPLY_TIMEOUT_S))
            except queue.Empty:
                raise FleetError(f"{self.name} said nothing for {REPLY_TIMEOUT_S:g} s") from None
            if reply.error:
                raise FleetError(f"{self.name} failed ({reply.error.code}): {reply.error.message}")
            yield reply
            if reply.done:
                return

    def take_num_questioned(self) -> int:
        """Tokens that workers were asked to choose since the last call: theirs are so many rows of the LM head."""
        questions = self._questions
        self._questions = []
        return sum(_num_rows(payload) for payload in questions)

    @property
    def is_up(self) -> bool:
        return self._link.is_up

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> None:
        if topic.startswith(topics.reply(self.name, APP, "")):
            self._replies.put(payload)
            return
        self.messages_up += 1
        if topic.startswith(f"{topics.PREFIX}/w/"):
            self._questions.append(payload)
        self._link.publish(topic, payload, qos=qos, retain=retain)

    def flush(self, timeout_s: float) -> None:
        self._link.flush(timeout_s)

    def subscribe(
        self, topic_filter: str, handler: Handler, *, qos: int = 0, retained: bool = False
    ) -> None:
        if topic_filter == prompts_of(self.name):
            self._on_prompt = handler
            return

        def counting(topic: str, payload: bytes) -> None:
            self.messages_down += 1
            handler(topic, payload)

        self._link.subscribe(topic_filter, counting, qos=qos, retained=retained)

    def unsubscribe(self, topic_filter: str) -> None:
        self._link.unsubscribe(topic_filter)

    def on_up(self, callback: Callable[[], None]) -> None:
        self._link.on_up(callback)

    def off_up(self, callback: Callable[[], None]) -> None:
        self._link.off_up(callback)

    def close(self) -> None:
        self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _num_rows(payload: bytes) -> int:
    message = decode_to_worker(payload)
    return len(message.draft) if isinstance(message, Verify) else 0
