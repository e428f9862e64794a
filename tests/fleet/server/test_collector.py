"""The collector between the broker and the registry."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import event

from fleet.protocol import topics
from fleet.protocol.access import Role
from fleet.protocol.report import (
    DeviceStatus,
    GenerationReport,
    ReportReceipt,
    Switch,
    WorkerStatus,
    decode_receipt,
    encode_report,
    encode_status,
)
from fleet.protocol.types import DAY_S
from fleet.registry.stats.ingest import ReceivedStatus
from fleet.registry.store import Registry
from fleet.server import collector as module
from fleet.server import collector_queue, report_admission
from fleet.server.collector import Collector
from fleet.server.collector_queue import MAX_OF_DEVICE, CollectorQueue
from fleet.server.report_admission import (
    BURST_BYTES,
    RATE_BYTES,
    SWITCH_COST,
    ReportRules,
    report_cost,
)
from fleet.transport.in_memory import InMemoryBroker, InMemoryTransport
from tests.brokers import Inbox as Received
from tests.brokers import wait_until
from tests.fleet.conftest import add, report

ONLINE = DeviceStatus(online=True, epoch=1, bundle_id="b1", version="0.1.0", mode="standalone")


class Site:
    """A collector on an in-memory broker, and the device edge-1 that receives its receipts."""

    def __init__(
        self, device: InMemoryTransport, collector_link: InMemoryTransport, collector: Collector
    ) -> None:
        self.device = device
        self.collector_link = collector_link
        self.collector = collector
        self._receipts = Received()
        device.subscribe(topics.device_reported("+"), self._receipts)

    def send(self, topic: str, payload: bytes) -> None:
        self.device.publish(topic, payload, qos=1)

    def report(self, device: str, what: GenerationReport) -> None:
        self.send(topics.device_stats(device), encode_report(what))

    def receipt(self) -> ReportReceipt:
        return decode_receipt(self._receipts.get()[1])


@contextmanager
def site(
    registry: Registry, max_waiting: int = 1000, rules: ReportRules = module.DEFAULT_RULES
) -> Iterator[Site]:
    broker = InMemoryBroker()
    with (
        broker.connect("edge-1") as device,
        broker.connect("collector") as server,
        Collector(server, registry, max_waiting, rules) as collector,
    ):
        yield Site(device, server, collector)


@pytest.fixture
def edge(registry: Registry) -> Registry:
    """A registry with the device edge-1."""
    add(registry, "edge-1")
    return registry


def test_a_report_is_acknowledged_once_it_is_stored(edge: Registry) -> None:
    with site(edge) as fleet:
        fleet.report("edge-1", report())
        assert fleet.receipt() == ReportReceipt(("g1",))
        assert edge.stats.per_device()[0].generations == 1


def test_a_worker_is_online_from_its_birth_to_its_last_will(registry: Registry) -> None:
    add(registry, "cloud-1", Role.WORKER)
    with site(registry) as fleet:
        for worker in ("stranger", "cloud-1"):
            fleet.send(
                topics.worker_status(worker),
                encode_status(
                    WorkerStatus(online=True, epoch=1, bundle_ids=("b1", "b2"), num_sessions=3)
                ),
            )
        wait_until(lambda: bool(registry.stats.workers()), "the worker is known")
        (row,) = registry.stats.workers()
        assert (row.worker, row.online, row.bundle_ids, row.num_sessions) == (
            "cloud-1",
            True,
            ("b1", "b2"),
            3,
        )
        fleet.send(
            topics.worker_status("cloud-1"), encode_status(WorkerStatus(online=False, epoch=0))
        )
        wait_until(lambda: not registry.stats.workers()[0].online, "the worker is gone")
        assert registry.stats.workers()[0].bundle_ids == ("b1", "b2")


def test_a_report_that_comes_twice_is_acknowledged_twice_and_counted_once(edge: Registry) -> None:
    with site(edge) as fleet:
        for _ in range(2):
            fleet.report("edge-1", report())
            assert fleet.receipt() == ReportReceipt(("g1",))
        assert edge.stats.per_device()[0].generations == 1
        assert fleet.collector.reports == {"stored": 1, "repeated": 1, "refused": 0, "dropped": 0}


def test_a_report_of_several_answers_counts_as_all_of_them(edge: Registry) -> None:
    with site(edge) as fleet:
        fleet.report("edge-1", report(answers=5))
        fleet.receipt()
    assert edge.stats.per_device()[0].generations == 5


def test_a_birth_is_stored_and_acknowledged_with_an_empty_receipt(edge: Registry) -> None:
    with site(edge) as fleet:
        fleet.send(topics.device_status("edge-1"), encode_status(ONLINE))
        assert fleet.receipt() == ReportReceipt()
        assert edge.stats.devices()[0].online


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"garbage\n\nof two lines",
        b"\xc1" * 10,
        b"\x80",
        b"{}",
        b"\x81\xa1a" * 3000,
        b"\xdd\xff\xff\xff\xff",
    ],
)
def test_a_malformed_message_is_dropped_with_one_line_and_harms_no_other(
    edge: Registry, caplog: pytest.LogCaptureFixture, payload: bytes
) -> None:
    with site(edge) as fleet, caplog.at_level(logging.INFO):
        fleet.send(topics.device_stats("edge-1"), payload)
        fleet.send(topics.device_status("edge-1"), payload)
        fleet.report("edge-1", report())
        assert fleet.receipt() == ReportReceipt(("g1",))
        assert len(caplog.messages) == (2 if payload else 1)  # an empty status is a cleared one
        assert all(
            line.startswith("dropped a message on 'ce/v1/d/edge-1/") for line in caplog.messages
        )
        assert not any("\n" in line for line in caplog.messages)
    assert edge.stats.per_device()[0].tokens == 10


def test_a_flood_of_malformed_messages_writes_a_limited_number_of_lines(
    edge: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    with site(edge) as fleet:
        for _ in range(100):
            fleet.send(topics.device_stats("edge-1"), b"garbage")
        fleet.report("edge-1", report())
        assert fleet.receipt() == ReportReceipt(("g1",))
    assert len(caplog.messages) == module.MAX_LINES
    assert fleet.collector.reports["refused"] == 100


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": -1},
        {"tokens": 11},
        {"sources": {"moon": 10}},
        {"started_at": float("nan")},
        {"ttft_ms": float("inf")},
        {"bytes_up": 1 << 60},
        {"finish_reason": 7},
        {"answers": 0},
    ],
)
def test_a_report_of_impossible_values_is_refused_with_its_reason(
    edge: Registry, caplog: pytest.LogCaptureFixture, changes: dict[str, object]
) -> None:
    with site(edge) as fleet:
        fleet.report("edge-1", msgspec.structs.replace(report(), **changes))
        receipt = fleet.receipt()
    assert receipt.stored == ()
    assert receipt.refused.keys() == {"g1"}
    assert len(caplog.messages) == 1
    assert receipt.refused["g1"] in caplog.messages[0]
    assert edge.stats.per_device()[0].generations == 0


def test_a_report_without_a_usable_name_is_dropped_without_a_receipt(edge: Registry) -> None:
    with site(edge) as fleet:
        fleet.report("edge-1", report("../../etc"))
        fleet.report("edge-1", report())
        assert fleet.receipt() == ReportReceipt(("g1",))
        assert fleet.collector.reports["refused"] == 1


def test_a_bad_report_harms_no_other_of_its_batch(edge: Registry) -> None:
    wrong = report("wrong", tokens=11)
    fates = edge.stats.record_reports(
        {("edge-1", it.generation): it for it in (report("g1"), wrong, report("g2"))}
        | {("oven", "g1"): report("g1")}
    )
    assert [fate for fate in fates.values() if isinstance(fate, bool)] == [True, True]
    assert "add up to 10" in str(fates["edge-1", "wrong"])
    assert "unknown device 'oven'" in str(fates["oven", "g1"])
    assert edge.stats.per_device()[0].generations == 2


def test_a_value_that_the_database_refuses_harms_no_other_of_its_batch(edge: Registry) -> None:
    """PostgreSQL accepts no NUL in a text; SQLite does."""
    reports = [report(f"g{i}", finish_reason="\0" if i == 3 else "stop") for i in range(8)]
    fates = edge.stats.record_reports({("edge-1", it.generation): it for it in reports})
    odd = fates.pop(("edge-1", "g3"))
    assert set(fates.values()) == {True}
    assert odd is True or "refuses generation g3" in str(odd)
    assert edge.stats.per_device()[0].generations == (8 if odd is True else 7)


def test_a_status_that_the_database_refuses_delays_no_other(edge: Registry) -> None:
    """PostgreSQL accepts no NUL in a text; SQLite does."""
    add(edge, "edge-2")
    add(edge, "cloud-1", Role.WORKER)
    with site(edge) as fleet:
        fleet.send(
            topics.device_status("edge-2"),
            encode_status(DeviceStatus(online=True, epoch=1, version="\0")),
        )
        fleet.send(
            topics.worker_status("cloud-1"),
            encode_status(WorkerStatus(online=True, epoch=1, version="\0")),
        )
        fleet.send(topics.device_status("edge-1"), encode_status(ONLINE))
        fleet.report("edge-1", report())
        wait_until(lambda: bool(fleet.receipt().stored), "the report is stored")
    assert {row.device: row.online for row in edge.stats.devices()}["edge-1"]


def test_a_device_that_left_while_the_broker_was_away_is_offline_afterwards(edge: Registry) -> None:
    add(edge, "edge-2")
    add(edge, "cloud-1", Role.WORKER)
    births = {
        topics.device_status("edge-1"): encode_status(ONLINE),
        topics.device_status("edge-2"): encode_status(ONLINE),
        topics.worker_status("cloud-1"): encode_status(WorkerStatus(online=True, epoch=1)),
    }

    def online() -> set[str]:
        return {row.device for row in edge.stats.devices() if row.online} | {
            w.worker for w in edge.stats.workers() if w.online
        }

    with site(edge) as fleet:
        for topic, payload in births.items():
            fleet.device.publish(topic, payload, qos=1, retain=True)
        wait_until(lambda: online() == {"edge-1", "edge-2", "cloud-1"}, "all are online")
        fleet.collector_link.drop()
        for topic in (topics.device_status("edge-2"), topics.worker_status("cloud-1")):
            fleet.device.publish(
                topic, b"", qos=1, retain=True
            )  # a restarted broker has no retained status
        fleet.collector_link.restore()
        wait_until(lambda: online() == {"edge-1"}, "who left is offline")


def test_messages_of_an_unknown_device_are_dropped_with_one_line_each(
    edge: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    with site(edge) as fleet:
        fleet.report("oven", report())
        fleet.send(topics.device_status("oven"), encode_status(DeviceStatus(online=True, epoch=1)))
        fleet.send("ce/v1/d/Not A Name/stats", encode_report(report()))
        fleet.report("edge-1", report())
        assert fleet.receipt() == ReportReceipt(("g1",)), "the oven is not told to forget"
        wait_until(lambda: len(caplog.messages) == 3, "three lines are logged")
    assert [row.generations for row in edge.stats.per_device()] == [1]


def test_the_retained_status_of_a_device_that_is_not_enrolled_is_cleared(edge: Registry) -> None:
    statuses = Received()
    with site(edge) as online:
        online.device.subscribe(topics.DEVICE_STATUS_FILTER, statuses, qos=1)
        for name in ("edge-1", "ghost"):
            topic = topics.device_status(name)
            online.device.publish(topic, encode_status(ONLINE), qos=1, retain=True)
            assert statuses.get() == (topic, encode_status(ONLINE))
        assert statuses.get() == (topics.device_status("ghost"), b"")
    assert statuses.is_empty


def test_the_devices_name_is_the_topics_whatever_the_payload_says(edge: Registry) -> None:
    add(edge, "edge-2")
    forged = msgspec.msgpack.encode(msgspec.to_builtins(report()) | {"device": "edge-2"})
    with site(edge) as fleet:
        fleet.send(topics.device_stats("edge-1"), forged)
        fleet.receipt()
    assert {row.device: row.generations for row in edge.stats.per_device()} == {
        "edge-1": 1,
        "edge-2": 0,
    }


def test_a_device_that_died_while_the_collector_was_off_is_offline_at_its_start(
    edge: Registry,
) -> None:
    edge.stats.record_status("edge-1", DeviceStatus(online=True, epoch=1), 10.0)
    with site(edge):
        assert not edge.stats.devices()[0].online


def test_a_device_that_is_still_online_is_so_after_a_restart_and_gets_a_receipt(
    edge: Registry,
) -> None:
    broker = InMemoryBroker()
    receipts = Received()
    with broker.connect("edge-1") as device, broker.connect("collector") as server:
        device.subscribe(topics.device_reported("edge-1"), receipts)
        device.publish(
            topics.device_status("edge-1"),
            encode_status(DeviceStatus(online=True, epoch=1)),
            qos=1,
            retain=True,
        )
        with Collector(server, edge):
            assert decode_receipt(receipts.get()[1]) == ReportReceipt()
            assert edge.stats.devices()[0].online


def test_a_birth_and_a_last_will_from_while_the_registry_was_away_are_stored(
    edge: Registry,
) -> None:
    inbox = CollectorQueue(max_reports=10)
    for at, status in enumerate(
        (
            ONLINE,
            DeviceStatus(online=False, epoch=0),
            ONLINE,
            DeviceStatus(online=False, epoch=0),
            DeviceStatus(online=False, epoch=0),
        )
    ):
        inbox.put_status(ReceivedStatus("edge-1", status, float(at)))
    batch = inbox.take(max_reports=10, timeout_s=0.0)
    assert batch is not None
    assert [(heard.status, heard.at) for heard in batch.statuses] == [
        (ONLINE, 2.0),
        (DeviceStatus(online=False, epoch=0), 4.0),
    ]


def test_a_registry_that_is_away_is_logged_once_and_no_message_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Registry.open(tmp_path / "registry.sqlite") as registry:
        add(registry, "edge-1")
        with site(registry) as fleet:
            (tmp_path / "registry.sqlite").rename(tmp_path / "away.sqlite")
            registry.close()
            (tmp_path / "registry.sqlite").mkdir()
            fleet.report("edge-1", report("g1"))
            wait_until(lambda: bool(caplog.messages), "the collector has noticed")
            assert "is not available" in caplog.messages[0]
            fleet.report("edge-1", report("g2"))
            (tmp_path / "registry.sqlite").rmdir()
            (tmp_path / "away.sqlite").rename(tmp_path / "registry.sqlite")
            assert fleet.receipt().stored == ("g1",)
            assert fleet.receipt().stored == ("g2",)
        assert registry.stats.per_device()[0].generations == 2
    assert ["is not available" in line for line in caplog.messages] == [True, False]


def test_a_device_that_was_turned_away_is_told_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_BATCH", 1)
    path = tmp_path / "registry.sqlite"
    with Registry.open(path) as registry:
        add(registry, "edge-1")
        with site(registry, max_waiting=2) as fleet:
            lock = sqlite3.connect(path, isolation_level=None)
            lock.execute("BEGIN IMMEDIATE")
            for i in range(8):
                fleet.report("edge-1", report(f"g{i}"))
            wait_until(lambda: fleet.collector.reports["dropped"] >= 5, "the collector has no room")
            lock.close()
            stored: set[str] = set()
            while (receipt := fleet.receipt()) != ReportReceipt():
                stored.update(receipt.stored)
            dropped = {f"g{i}" for i in range(8)} - stored
            assert len(dropped) == fleet.collector.reports["dropped"]
            for generation in dropped:
                fleet.report("edge-1", report(generation))
                fleet.receipt()
        assert registry.stats.per_device()[0].generations == 8


def test_messages_from_before_the_end_are_stored(edge: Registry) -> None:
    with site(edge) as fleet:
        for i in range(50):
            fleet.report("edge-1", report(f"g{i}"))
        heard = Received()
        fleet.collector_link.subscribe("the-end", heard)
        fleet.send("the-end", b"")
        heard.get()
    assert edge.stats.per_device()[0].generations == 50


def test_two_processes_with_one_identity_are_named(
    edge: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    with site(edge) as fleet:
        for epoch in (1, 2, 1, 2):
            status = msgspec.structs.replace(ONLINE, epoch=epoch)
            fleet.send(topics.device_status("edge-1"), encode_status(status))
            fleet.receipt()  # it is stored before the next one comes
        wait_until(
            lambda: bool(edge.audit_log.entries("edge-1", action="shared_identity")),
            "the finding is stored",
        )
    assert "two processes use the identity of edge-1" in caplog.text


NOW = time.time()
RULES = ReportRules(
    max_age_s=30 * DAY_S, exits_of=lambda bundle_id: (8, 15) if bundle_id == "b1" else None
)
SWITCH = Switch(3, "verified", "the link is back")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"sources": {"exit:9": 10}}, "tokens from exit:9, an exit that bundle b1 lacks"),
        ({"switches": (SWITCH,) * 17}, "17 switches, expected at most 16"),
        ({"started_at": NOW - 31 * DAY_S}, "more than 30 days ago"),
        ({"started_at": NOW + 1.1 * DAY_S}, "in the future"),
        (
            {"bundle_id": "b2", "sources": {f"exit:{i}": 1 for i in range(20)}, "tokens": 20},
            "has 20 sources",
        ),
    ],
)
def test_a_report_that_no_device_can_have_made_is_refused(
    edge: Registry, changes: dict[str, object], problem: str
) -> None:
    plausible = {"started_at": NOW - 29 * DAY_S, "switches": (SWITCH,) * 16}
    with site(edge, rules=RULES) as fleet:
        fleet.report("edge-1", report("g1", **{"started_at": NOW} | changes))
        assert problem in fleet.receipt().refused["g1"]
        fleet.report("edge-1", report("g2", **plausible))
        assert fleet.receipt().stored == ("g2",)


def test_a_device_may_report_on_few_bundles_that_the_fleet_does_not_have(edge: Registry) -> None:
    edge.rollouts.add_bundle("b1", "a model", 1)
    reports = [report(f"g{i}", bundle_id=f"made-up-{i}") for i in range(9)]
    reports += [report("g9", bundle_id="b1"), report("g10", bundle_id="made-up-0")]
    for part in (reports[:3], reports[3:]):
        fates = edge.stats.record_reports({("edge-1", it.generation): it for it in part})
    assert [it.generation for it in reports[3:] if fates["edge-1", it.generation] is True] == [
        "g3",
        "g9",
        "g10",
    ]
    assert "bundle made-up-8, which the fleet does not have" in str(fates["edge-1", "g8"])


def test_one_devices_flood_leaves_a_neighbours_report_its_turn() -> None:
    inbox = CollectorQueue(max_reports=20_000)
    for i in range(2000):
        inbox.put_report("edge-7", report(f"g{i}"))
    assert inbox.put_report("edge-1", report("mine"))
    batch = inbox.take(max_reports=10, timeout_s=0.0)
    assert batch is not None
    assert ("edge-1", "mine") in batch.reports
    left = inbox.take(max_reports=20_000, timeout_s=0.0)
    assert left is not None
    assert len(batch.reports) + len(left.reports) == MAX_OF_DEVICE + 1


def test_a_flood_is_stored_up_to_the_devices_volume_and_no_further(edge: Registry) -> None:
    add(edge, "edge-2")
    switches = tuple(Switch(i, "verified", "x" * i) for i in range(16))
    with site(edge) as fleet:
        for i in range(1000):
            fleet.report("edge-1", report(f"flood-{i}", switches=switches))
            if i % 100 == 0:
                fleet.report("edge-2", report(f"mine-{i}"))
        wait_until(
            lambda: edge.stats.per_device("edge-2")[0].generations == 10, "the neighbour's are in"
        )
    num_stored = edge.stats.per_device("edge-1")[0].generations
    cost = report_cost(encode_report(report("flood-1", switches=switches))) + 16 * SWITCH_COST
    assert num_stored <= (BURST_BYTES + 60 * RATE_BYTES) / cost
    assert fleet.collector.reports["dropped"] >= 900 - num_stored


def test_a_device_over_its_volume_may_send_again_after_a_pause(
    edge: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_admission, "BURST_BYTES", 600)
    monkeypatch.setattr(collector_queue, "PAUSE_S", 0.1)
    monkeypatch.setattr(module, "WAIT_S", 0.05)
    with site(edge) as fleet:
        fleet.report("edge-1", report("g1"))
        fleet.report("edge-1", report("g2"))
        fleet.report("edge-1", report("g3"))
        receipts = [fleet.receipt()]
        while receipts[-1] != ReportReceipt():
            receipts.append(fleet.receipt())
        assert sum(len(receipt.stored) for receipt in receipts) == 2
        fleet.report("edge-1", report("g3"))
        assert fleet.receipt().stored == ("g3",)


def test_many_statuses_are_one_transaction(edge: Registry) -> None:
    names = [f"many-{i}" for i in range(200)]
    for name in names:
        add(edge, name)
    add(edge, "cloud-1", Role.WORKER)
    received = [ReceivedStatus(name, ONLINE, 10.0) for name in names]
    received.append(ReceivedStatus("cloud-1", WorkerStatus(online=True, epoch=1), 10.0))
    received.append(ReceivedStatus("many-7", DeviceStatus(online=False, epoch=0), 11.0))
    received.append(ReceivedStatus("oven", ONLINE, 10.0))
    statements: list[str] = []
    engine = edge._engine
    event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    refused = edge.stats.record_statuses(received)
    assert len(statements) < 20
    assert refused.keys() == {"oven"}
    online = {row.device: (row.online, row.last_seen) for row in edge.stats.devices()}
    assert [name for name in names if online[name] != (True, 10.0)] == ["many-7"]
    assert online["many-7"] == (False, 11.0)
    assert edge.stats.workers()[0].online


def test_a_device_that_repeats_its_status_need_not_send_its_reports_again_each_time(
    edge: Registry,
) -> None:
    with site(edge) as fleet:
        for mode in ("standalone", "auto", "verified"):
            status = msgspec.structs.replace(ONLINE, mode=mode)
            fleet.send(topics.device_status("edge-1"), encode_status(status))
            wait_until(lambda m=mode: edge.stats.devices()[0].mode == m, "it is stored")  # type: ignore[misc]
        fleet.report("edge-1", report())
        assert fleet.receipt() == ReportReceipt()
        assert fleet.receipt().stored == ("g1",)
