"""The transport's in-memory twin: a broker without a network, whose links can be cut and healed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from fleet.errors import LinkError
from fleet.protocol.topics import matches
from fleet.transport.base import (
    MAX_QUEUED,
    MAX_RETAINED,
    Handler,
    Transport,
    Will,
    dispatch,
    guarded,
)


class InMemoryBroker:
    """Connects transports of one process. It keeps retained messages; it checks nobody's rights."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._clients: list[InMemoryTransport] = []
        self._retained: dict[str, bytes] = {}

    def connect(self, name: str, will: Will | None = None) -> InMemoryTransport:
        """A transport whose link is up."""
        return InMemoryTransport(self, name, will)

    def _publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        with self._lock:
            if retain and payload:
                self._retained[topic] = payload
            elif retain:
                self._retained.pop(topic, None)
            for client in self._clients:
                client._offer(topic, payload)

    def _attach(self, client: InMemoryTransport) -> None:
        with self._lock:
            self._clients.append(client)

    def _detach(self, client: InMemoryTransport) -> None:
        with self._lock:
            if client in self._clients:
                self._clients.remove(client)

    def _offer_retained(self, client: InMemoryTransport, topic_filter: str) -> None:
        with self._lock:
            for topic, payload in self._retained.items():
                if matches(topic_filter, topic):
                    client._offer(topic, payload)


class InMemoryTransport(Transport):
    """One client of a `InMemoryBroker`. Its handlers run on a thread of its own."""

    def __init__(self, broker: InMemoryBroker, name: str, will: Will | None) -> None:
        self.name = name
        self._broker = broker
        self._will = will
        self._lock = threading.RLock()
        self._handlers: dict[str, Handler] = {}
        self._callbacks: list[Callable[[], None]] = []
        self._waiting: list[tuple[str, bytes, bool]] = []
        self._link = (
            0  # the number of the present link; what an earlier one left behind is not delivered
        )
        self._is_up = False
        self._closed = False
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"memory-{name}", daemon=True)
        self._thread.start()
        self.restore()

    @property
    def is_up(self) -> bool:
        return self._is_up

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> None:
        with self._lock:
            if self._closed:
                raise LinkError(f"{self.name} is closed; connect again")
            if not self._is_up and qos == 0:
                raise LinkError(f"{self.name} has no link to the broker; send again when it is up")
            if not self._is_up and len(self._waiting) >= MAX_QUEUED + (
                MAX_RETAINED if retain else 0
            ):
                raise LinkError(
                    f"{MAX_QUEUED} messages of {self.name} wait for the broker already; try later"
                )
            if not self._is_up:
                self._waiting.append((topic, payload, retain))
                return
        self._broker._publish(topic, payload, retain=retain)

    def flush(self, timeout_s: float) -> None:
        pass  # nothing waits on a link that is up

    def subscribe(
        self,
        topic_filter: str,
        handler: Handler,
        *,
        qos: int = 0,  # noqa: ARG002 (all are sure)
        retained: bool = False,  # noqa: ARG002 (all are sure)
    ) -> None:
        with self._lock:
            self._handlers[topic_filter] = handler
        self._broker._offer_retained(self, topic_filter)

    def unsubscribe(self, topic_filter: str) -> None:
        with self._lock:
            self._handlers.pop(topic_filter, None)

    def on_up(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)
        if self._is_up:
            callback()

    def off_up(self, callback: Callable[[], None]) -> None:
        if callback in self._callbacks:
            self._callbacks.remove(callback)

    def drop(self) -> None:
        """Cuts the link as a pulled plug does: the will is sent, and what was under way to us is lost."""
        if self._is_up:
            self._cut()
            if self._will:
                self._broker._publish(self._will.topic, self._will.payload, retain=True)

    def restore(self) -> None:
        """Heals the link: subscriptions and announcements come back, then what was queued goes out."""
        with self._lock:
            if self._is_up or self._closed:
                return
            self._is_up = True
            self._link += 1
            callbacks = list(self._callbacks)
            filters = list(self._handlers)
        for callback in callbacks:
            self._jobs.put(lambda callback=callback: guarded(callback, "on_up callback"))  # type: ignore[misc]
        self._broker._attach(self)
        for topic_filter in filters:
            self._broker._offer_retained(self, topic_filter)
        self._jobs.put(self._send_waiting)

    def close(self) -> None:
        self._closed = True
        self._cut()
        self._jobs.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _cut(self) -> None:
        self._broker._detach(self)
        with self._lock:
            self._is_up = False
            self._link += 1

    def _send_waiting(self) -> None:
        with self._lock:
            if not self._is_up:
                return
            waiting = self._waiting
            self._waiting = []
        for topic, payload, retain in waiting:
            self._broker._publish(topic, payload, retain=retain)

    def _offer(self, topic: str, payload: bytes) -> None:
        """Called by the broker under its lock, so that the order is the same for every subscriber."""
        link = self._link
        if self._is_up and any(
            matches(topic_filter, topic) for topic_filter in list(self._handlers)
        ):
            self._jobs.put(lambda: self._deliver(link, topic, payload))

    def _deliver(self, link: int, topic: str, payload: bytes) -> None:
        if link == self._link:
            dispatch(list(self._handlers.items()), topic, payload)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
