"""The wait for a device's retained status, on an in-memory broker."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from fleet.cli.device_status import await_online
from fleet.errors import LinkError, UnknownDeviceError
from fleet.protocol import topics
from fleet.protocol.denylist import encode_denylist
from fleet.protocol.report import DeviceStatus, encode_status
from fleet.transport.in_memory import InMemoryBroker, InMemoryTransport

WAIT_S = 60.0
SHORT_S = 0.2
ONLINE = DeviceStatus(online=True, epoch=1, bundle_id="b1")
OFFLINE = DeviceStatus(online=False, epoch=1)


@pytest.fixture
def server() -> Iterator[InMemoryTransport]:
    """The server's link, which has published an empty denylist."""
    broker = InMemoryBroker()
    with broker.connect("hub") as link:
        deny(link)
        yield link


@pytest.fixture
def operator(server: InMemoryTransport) -> Iterator[InMemoryTransport]:
    with server._broker.connect("operator-1") as link:
        yield link


def deny(link: InMemoryTransport, *names: str) -> None:
    link.publish(topics.REVOKED, encode_denylist(names), qos=1, retain=True)


def publish(link: InMemoryTransport, status: DeviceStatus) -> None:
    link.publish(topics.device_status("d1"), encode_status(status), qos=1, retain=True)


def await_d1(
    link: InMemoryTransport, offline_wait_s: float = WAIT_S, unknown_wait_s: float = WAIT_S
) -> DeviceStatus:
    return await_online(link, "d1", offline_wait_s=offline_wait_s, unknown_wait_s=unknown_wait_s)


def test_an_online_device_has_its_status(
    server: InMemoryTransport, operator: InMemoryTransport
) -> None:
    publish(server, ONLINE)
    assert await_d1(operator) == ONLINE


def test_a_device_may_come_online_within_the_deadline(
    server: InMemoryTransport, operator: InMemoryTransport
) -> None:
    publish(server, OFFLINE)
    timer = threading.Timer(0.05, publish, (server, ONLINE))
    timer.start()
    assert await_d1(operator) == ONLINE
    timer.join()


def test_an_offline_device_is_an_error(
    server: InMemoryTransport, operator: InMemoryTransport
) -> None:
    publish(server, OFFLINE)
    with pytest.raises(LinkError, match="device d1 is offline; start it with 'edge-agent run DIR'"):
        await_d1(operator, offline_wait_s=SHORT_S)


@pytest.mark.usefixtures("server")
def test_a_device_without_a_status_is_unknown(operator: InMemoryTransport) -> None:
    with pytest.raises(UnknownDeviceError, match=r"unknown device 'd1': .*'fleet enroll d1'"):
        await_d1(operator, unknown_wait_s=SHORT_S)


def test_a_revoked_device_is_offline_though_its_last_status_says_online(
    server: InMemoryTransport, operator: InMemoryTransport
) -> None:
    publish(server, ONLINE)
    deny(server, "d0", "d1")
    with pytest.raises(LinkError, match="device d1 is offline: it is suspended, revoked or expir"):
        await_d1(operator)
