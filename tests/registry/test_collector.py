"""The collector between the broker and the registry."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from fleet import topics
from fleet.memory import MemoryBroker, MemoryTransport
from fleet.registry.collector import Collector
from fleet.registry.store import Registry
from fleet.report import DeviceStatus, GenerationReport, encode_report, encode_status
from tests.registry.conftest import add, report

WAIT_S = 10.0


class Site:
    """A collector on an in-memory broker, and a device's link to it."""

    def __init__(self, broker: MemoryBroker, device: MemoryTransport, server: MemoryTransport) -> None:
        self.broker, self.device, self._server = broker, device, server

    def send(self, topic: str, payload: bytes) -> None:
        """Publishes, and returns once the collector has dealt with it."""
        self.device.publish(topic, payload, qos=1)
        self.settle()

    def report(self, device: str, what: GenerationReport) -> None:
        self.send(topics.device_stats(device), encode_report(what))

    def settle(self) -> None:
        handled = threading.Event()
        self._server.subscribe("settled", lambda *_: handled.set())
        self.device.publish("settled", b"")
        assert handled.wait(WAIT_S)


@contextmanager
def site(registry: Registry) -> Iterator[Site]:
    broker = MemoryBroker()
    with broker.connect("collector") as server, broker.connect("edge-1") as device:
        Collector(server, registry)
        yield Site(broker, device, server)


def test_reports_and_statuses_reach_the_registry(registry: Registry) -> None:
    add(registry, "edge-1")
    with site(registry) as fleet:
        fleet.send(topics.device_status("edge-1"), encode_status(DeviceStatus(True, 1, "b1", "0.1.0", "standalone")))
        fleet.report("edge-1", report())
        fleet.report("edge-1", report())
    assert registry.devices()[0].online
    assert registry.stats()[0].generations == 1


@pytest.mark.parametrize(
    "payload",
    [b"", b"garbage\n\nof two lines", b"\xc1" * 10, b"\x80", b"{}", b"\x81\xa1a" * 3000, b"\xdd\xff\xff\xff\xff"],
)
def test_garbage_is_dropped_in_one_line_and_the_others_are_served(
    registry: Registry, caplog: pytest.LogCaptureFixture, payload: bytes
) -> None:
    add(registry, "edge-1")
    with site(registry) as fleet, caplog.at_level(logging.INFO):
        fleet.send(topics.device_stats("edge-1"), payload)
        fleet.send(topics.device_status("edge-1"), payload)
        assert len(caplog.messages) == 2
        assert all(line.startswith("dropped a message on 'ce/v1/d/edge-1/") for line in caplog.messages)
        assert not any("\n" in line for line in caplog.messages)
        fleet.report("edge-1", report())
    assert registry.stats()[0].tokens == 10


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": -1},
        {"tokens": 11},
        {"sources": {"moon": 10}},
        {"started_at": float("nan")},
        {"ttft_ms": float("inf")},
        {"bytes_up": 1 << 60},
        {"generation": "../../etc"},
        {"finish_reason": 7},
    ],
)
def test_a_report_of_impossible_values_is_dropped(
    registry: Registry, caplog: pytest.LogCaptureFixture, changes: dict[str, object]
) -> None:
    add(registry, "edge-1")
    with site(registry) as fleet:
        fleet.report("edge-1", msgspec.structs.replace(report(), **changes))
    assert len(caplog.messages) == 1
    assert registry.stats()[0].generations == 0


def test_messages_of_a_device_that_nobody_enrolled_are_dropped_in_one_line_each(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    add(registry, "edge-1")
    with site(registry) as fleet:
        fleet.report("oven", report())
        fleet.send(topics.device_status("oven"), encode_status(DeviceStatus(True, 1)))
        fleet.send("ce/v1/d/Not A Name/stats", encode_report(report()))
    assert len(caplog.messages) == 3
    assert [row.generations for row in registry.stats()] == [0]


def test_the_devices_name_is_the_topics_whatever_the_payload_says(registry: Registry) -> None:
    add(registry, "edge-1")
    add(registry, "edge-2")
    forged = msgspec.msgpack.encode(msgspec.to_builtins(report()) | {"device": "edge-2"})
    with site(registry) as fleet:
        fleet.send(topics.device_stats("edge-1"), forged)
    assert {row.device: row.generations for row in registry.stats()} == {"edge-1": 1, "edge-2": 0}


def test_a_device_that_died_while_nobody_listened_is_offline_at_the_next_start(registry: Registry) -> None:
    add(registry, "edge-1")
    registry.record_status("edge-1", DeviceStatus(True, 1), 10.0)
    with site(registry):
        assert not registry.devices()[0].online


def test_a_device_that_is_still_there_is_online_after_a_new_start(registry: Registry) -> None:
    add(registry, "edge-1")
    broker = MemoryBroker()
    with broker.connect("edge-1") as device, broker.connect("collector") as server:
        device.publish(topics.device_status("edge-1"), encode_status(DeviceStatus(True, 1)), qos=1, retain=True)
        Collector(server, registry)
        Site(broker, device, server).settle()
        assert registry.devices()[0].online


def test_a_registry_that_is_out_of_order_loses_a_message_and_not_the_collector(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Registry.open(tmp_path / "registry.sqlite") as registry:
        add(registry, "edge-1")
        with site(registry) as fleet:
            (tmp_path / "registry.sqlite").rename(tmp_path / "away.sqlite")
            registry.close()
            (tmp_path / "registry.sqlite").mkdir()
            fleet.report("edge-1", report("g1"))
            assert "cannot answer" in caplog.messages[0]
            (tmp_path / "registry.sqlite").rmdir()
            (tmp_path / "away.sqlite").rename(tmp_path / "registry.sqlite")
            fleet.report("edge-1", report("g2"))
        assert registry.stats()[0].generations == 1
