"""An app's side of a prompt: send it, follow the stream of replies."""

from __future__ import annotations

import logging
import queue
import uuid
from collections.abc import Iterator
from typing import Final

import msgspec

from fleet import topics
from fleet.errors import FleetError, LinkError, PromptError
from fleet.prompt import PromptRequest, Reply, decode_reply
from fleet.transport import Transport

log = logging.getLogger(__name__)

REPLY_TIMEOUT_S: Final = 60.0


class PromptClient:
    """Asks devices under the transport's name, an app's or an operator's."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._streams: dict[str, queue.Queue[Reply]] = {}
        transport.subscribe(topics.reply("+", transport.name, "+"), self._on_reply, qos=1)

    def ask(self, device: str, prompt: PromptRequest, timeout_s: float = REPLY_TIMEOUT_S) -> Iterator[Reply]:
        """The replies of one request, in order; the last one has `done`. An abandoned stream is cancelled.

        Raises:
            LinkError: no reply within `timeout_s` of the one before.
            PromptError: the device refused the request.
        """
        request = uuid.uuid4().hex
        stream = self._streams[request] = queue.Queue()
        done = False
        try:
            self._transport.publish(
                topics.prompt(device, self._transport.name, request), msgspec.json.encode(prompt), qos=1
            )
            while not done:
                try:
                    reply = stream.get(timeout=timeout_s)
                except queue.Empty:
                    raise LinkError(
                        f"device {device} did not answer within {timeout_s:g} s; is it running? see 'fleet devices'"
                    ) from None
                done = reply.done
                if reply.error:
                    raise PromptError(f"device {device} refused ({reply.error.code}): {reply.error.message}")
                yield reply
        finally:
            del self._streams[request]
            if not done:
                self._cancel(device, request)

    def _cancel(self, device: str, request: str) -> None:
        try:
            self._transport.publish(topics.cancel(device, self._transport.name, request), b"", qos=1)
        except LinkError as error:
            log.warning("request %s was not cancelled: %s", request, error)

    def _on_reply(self, topic: str, payload: bytes) -> None:
        try:
            _, _, request = topics.parse(topic, "d", "+", "reply", "+", "+")
            if stream := self._streams.get(request):
                stream.put(decode_reply(payload))
        except FleetError as error:
            log.warning("reply on %s dropped: %s", topic, error)
