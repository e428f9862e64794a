"""A device's transport with an app on the device: prompts and replies do not use the link."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from typing import Final, Self

import msgspec

from fleet.errors import FleetError
from fleet.protocol import topics
from fleet.protocol.codec import decode_to_worker
from fleet.protocol.messages import Verify
from fleet.protocol.prompt import PromptRequest, Reply, decode_reply
from fleet.transport.base import Handler, Transport

APP: Final = "app"
REPLY_TIMEOUT_S: Final = 120.0  # from one reply to the next


class LocalApp(Transport):
    """A wrapper of a device's transport that counts the messages."""

    def __init__(self, link: Transport) -> None:
        self.name = link.name
        self.messages_up = self.messages_down = 0
        self._link = link
        self._on_prompt: Handler | None = None
        self._replies: queue.Queue[bytes] = queue.Queue()
        self._questions: list[bytes] = []
        self._num_asked = 0

    def ask(self, request: PromptRequest) -> Iterator[Reply]:
        """Yield replies as they come; the last one is done.

        Raises:
            FleetError: the agent refuses it, or sends nothing for `REPLY_TIMEOUT_S` seconds.
        """
        if self._on_prompt is None:
            raise FleetError(f"{self.name} accepts no prompts; start its agent first")
        self._num_asked += 1
        self._on_prompt(
            topics.device_prompt(self.name, APP, f"r{self._num_asked}"),
            msgspec.json.encode(request),
        )
        while True:
            try:
                reply = decode_reply(self._replies.get(timeout=REPLY_TIMEOUT_S))
            except queue.Empty:
                raise FleetError(f"{self.name} sent nothing for {REPLY_TIMEOUT_S:g} s") from None
            if reply.error:
                raise FleetError(f"{self.name} failed ({reply.error.code}): {reply.error.message}")
            yield reply
            if reply.done:
                return

    def take_num_questioned(self) -> int:
        """Return the number of tokens requested from workers since the last call.

        The workers compute that many rows of the LM head.
        """
        questions = self._questions
        self._questions = []
        return sum(_num_rows(payload) for payload in questions)

    @property
    def is_up(self) -> bool:
        return self._link.is_up

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> None:
        if topic.startswith(topics.device_reply(self.name, APP, "")):
            self._replies.put(payload)
            return
        self.messages_up += 1
        if topics.matches(topics.TO_WORKER_FILTER, topic):
            self._questions.append(payload)
        self._link.publish(topic, payload, qos=qos, retain=retain)

    def flush(self, timeout_s: float) -> None:
        self._link.flush(timeout_s)

    def subscribe(
        self,
        topic_filter: str,
        handler: Handler,
        *,
        qos: int = 0,
        retained: bool = False,
        live_only: bool = False,
    ) -> None:
        if topic_filter == topics.prompts_to(self.name):
            self._on_prompt = handler
            return

        def counting(topic: str, payload: bytes) -> None:
            self.messages_down += 1
            handler(topic, payload)

        self._link.subscribe(
            topic_filter, counting, qos=qos, retained=retained, live_only=live_only
        )

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

    def __exit__(self, *_: object) -> None:
        self.close()


def _num_rows(payload: bytes) -> int:
    message = decode_to_worker(payload)
    return len(message.draft) if isinstance(message, Verify) else 0
