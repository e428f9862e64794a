"""A transport and a broker in memory, without a network, whose links can be cut."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Self

from fleet.errors import LinkError
from fleet.protocol.topics import matches
from fleet.transport.base import (
    MAX_QUEUED,
    MAX_RETAINED,
    Handler,
    Subscription,
    Transport,
    Will,
    dispatch,
    run_guarded,
)


class InMemoryBroker:
    """A broker within one process. It keeps retained messages and checks no rights."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._clients: list[InMemoryTransport] = []
        self._retained: dict[str, bytes] = {}

    def connect(self, name: str, will: Will | None = None) -> InMemoryTransport:
        """Return a transport with a link that is up."""
        transport = InMemoryTransport(self, name, will)
        transport.start()
        return transport

    def _publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        with self._lock:
            if retain and payload:
                self._retained[topic] = payload
            elif retain:
                self._retained.pop(topic, None)
            for client in self._clients:
                client._offer(topic, payload, is_retained=False)

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
                    client._offer(topic, payload, is_retained=True)


class InMemoryTransport(Transport):
    """One client of an `InMemoryBroker`. Its handlers run on a thread of its own."""

    def __init__(self, broker: InMemoryBroker, name: str, will: Will | None) -> None:
        self.name = name
        self._broker = broker
        self._will = will
        self._lock = threading.RLock()
        self._subscriptions: dict[str, Subscription] = {}
        self._callbacks: list[Callable[[], None]] = []
        self._waiting: list[tuple[str, bytes, bool]] = []
        self._link = 0  # the number of the current link; messages of earlier ones are dropped
        self._is_up = False
        self._closed = False
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"memory-{name}", daemon=True)

    def start(self) -> None:
        """Start the thread of the handlers and bring the link up."""
        self._thread.start()
        self.restore()

    @property
    def is_up(self) -> bool:
        return self._is_up

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> None:
        with self._lock:
            if self._closed:
                raise LinkError(f"the connection of {self.name} is closed; make a new one")
            if not self._is_up and qos == 0:
                raise LinkError(
                    f"{self.name} has no link to the broker; send again when the link is up"
                )
            max_waiting = MAX_QUEUED + (MAX_RETAINED if retain else 0)
            if not self._is_up and len(self._waiting) >= max_waiting:
                raise LinkError(
                    f"{MAX_QUEUED} messages of {self.name} already wait for the broker; try later"
                )
            if not self._is_up:
                self._waiting.append((topic, payload, retain))
                return
        self._broker._publish(topic, payload, retain=retain)

    def flush(self, timeout_s: float) -> None:
        """Return at once: nothing waits on a link that is up."""

    def subscribe(
        self,
        topic_filter: str,
        handler: Handler,
        *,
        qos: int = 0,  # noqa: ARG002 (every message arrives once)
        retained: bool = False,  # noqa: ARG002 (every message arrives once)
        live_only: bool = False,
    ) -> None:
        with self._lock:
            self._subscriptions[topic_filter] = Subscription(handler, live_only=live_only)
        self._broker._offer_retained(self, topic_filter)

    def unsubscribe(self, topic_filter: str) -> None:
        with self._lock:
            self._subscriptions.pop(topic_filter, None)

    def on_up(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)
        if self._is_up:
            callback()

    def off_up(self, callback: Callable[[], None]) -> None:
        if callback in self._callbacks:
            self._callbacks.remove(callback)

    def drop(self) -> None:
        """Cut the link. The broker sends the will, and messages that are under way are lost."""
        if self._is_up:
            self._cut()
            if self._will:
                self._broker._publish(self._will.topic, self._will.payload, retain=True)

    def restore(self) -> None:
        """Bring the link up: call the `on_up` callbacks, subscribe, and send queued messages."""
        with self._lock:
            if self._is_up or self._closed:
                return
            self._is_up = True
            self._link += 1
            callbacks = list(self._callbacks)
            filters = list(self._subscriptions)
        for callback in callbacks:
            self._jobs.put(partial(run_guarded, callback, "on_up callback"))
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

    def __exit__(self, *_: object) -> None:
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
            waiting = list(self._waiting)
            self._waiting.clear()
        for topic, payload, retain in waiting:
            self._broker._publish(topic, payload, retain=retain)

    def _offer(self, topic: str, payload: bytes, *, is_retained: bool) -> None:
        """Queue a message; the broker holds its lock, so each subscriber gets the same order."""
        link = self._link
        if self._is_up and any(matches(each, topic) for each in list(self._subscriptions)):
            self._jobs.put(partial(self._deliver, link, topic, payload, is_retained=is_retained))

    def _deliver(self, link: int, topic: str, payload: bytes, *, is_retained: bool) -> None:
        if link == self._link:
            dispatch(dict(self._subscriptions), topic, payload, is_retained=is_retained)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
