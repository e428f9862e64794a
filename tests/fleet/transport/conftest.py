"""Three brokers behind every transport: in memory, embedded, and mosquitto."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from fleet.transport.base import Transport, Will
from fleet.transport.in_memory import InMemoryBroker, InMemoryTransport
from fleet.transport.mqtt import MqttTransport
from tests.brokers import BROKERS, Site, running_site, wait_until


class World(Protocol):
    """Connections for the contract's tests, and the two ways to lose them."""

    def connect(self, name: str, will: Will | None = None) -> Transport: ...

    def kill(self, transport: Transport) -> None:
        """Cut one connection without a goodbye."""
        ...

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Stop the broker; on exit every link is up again."""
        ...


class MemoryWorld:
    def __init__(self, stack: ExitStack) -> None:
        self._broker = InMemoryBroker()
        self._stack = stack
        self._transports: list[InMemoryTransport] = []

    def connect(self, name: str, will: Will | None = None) -> Transport:
        transport = self._stack.enter_context(self._broker.connect(name, will))
        self._transports.append(transport)
        return transport

    def kill(self, transport: Transport) -> None:
        assert isinstance(transport, InMemoryTransport)
        transport.drop()

    @contextmanager
    def outage(self) -> Iterator[None]:
        for transport in self._transports:
            transport.drop()
        yield
        for transport in self._transports:
            transport.restore()


class MqttWorld:
    def __init__(self, site: Site, stack: ExitStack) -> None:
        self._site = site
        self._stack = stack
        self._transports: list[MqttTransport] = []

    def connect(self, name: str, will: Will | None = None) -> Transport:
        transport = self._stack.enter_context(self._site.connect(name, will))
        self._transports.append(transport)
        return transport

    def kill(self, transport: Transport) -> None:
        assert isinstance(transport, MqttTransport)
        sock = transport._client.socket()
        assert isinstance(sock, socket.socket)
        sock.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def outage(self) -> Iterator[None]:
        self._site.broker.stop()
        wait_until(lambda: not any(t.is_up for t in self._transports), "every link is down")
        yield
        self._site.broker.start()
        links = [link for link in self._transports if not link._closed.is_set()]
        wait_until(lambda: all(link.is_up for link in links), "every link is up again")


@pytest.fixture(params=["memory", *BROKERS])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    with ExitStack() as stack:
        if request.param == "memory":
            yield MemoryWorld(stack)
        else:
            site = stack.enter_context(running_site(request.param, tmp_path))
            yield MqttWorld(site, stack)
