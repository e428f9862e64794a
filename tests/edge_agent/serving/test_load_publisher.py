"""The load that a device publishes."""

from __future__ import annotations

import pytest

from edge_agent.serving.load_publisher import LoadPublisher
from fleet.protocol import topics
from fleet.protocol.report import DeviceLoad, decode_load
from fleet.transport.in_memory import InMemoryBroker
from tests.brokers import Inbox


@pytest.mark.parametrize(
    ("num_requests", "load"),
    [
        (0, DeviceLoad()),
        (1, DeviceLoad(num_running=1)),
        (2, DeviceLoad(num_running=2)),
        (5, DeviceLoad(num_running=2, num_waiting=3)),
    ],
)
def test_requests_beyond_those_that_run_are_waiting(num_requests: int, load: DeviceLoad) -> None:
    broker = InMemoryBroker()
    inbox = Inbox()
    with broker.connect("kitchen") as device, broker.connect("http-api") as gateway:
        gateway.subscribe(topics.DEVICE_LOAD_FILTER, inbox)
        LoadPublisher(device, 2, lambda: num_requests).publish()
        topic, payload = inbox.get()
    assert (topic, decode_load(payload)) == (topics.device_load("kitchen"), load)


def test_without_a_link_nothing_is_published() -> None:
    with InMemoryBroker().connect("kitchen") as device:
        device.drop()
        LoadPublisher(device, 2, lambda: 1).publish()
