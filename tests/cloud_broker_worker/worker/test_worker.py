"""A worker on the in-memory broker: what it announces, takes, answers and shrugs off."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import msgpack
import numpy as np
import pytest
from msgspec import UNSET, UnsetType

from cloud_broker_worker.worker.config import WorkerConfig
from cloud_broker_worker.worker.worker import Worker
from fleet.bundles.manifest import Bundle
from fleet.protocol import topics
from fleet.protocol.codec import MAX_ENVELOPE_BYTES, decode_to_device, encode, pack_chunk
from fleet.protocol.denylist import encode_denylist
from fleet.protocol.messages import (
    PROTOCOL,
    Close,
    Context,
    Continuation,
    Open,
    Opened,
    Refused,
    Sampling,
    ToDevice,
    ToWorker,
    Verified,
    Verify,
)
from fleet.protocol.report import DeviceStatus, WorkerStatus, decode_status, encode_status
from fleet.transport.base import Will
from fleet.transport.in_memory import InMemoryBroker, InMemoryTransport
from tests.brokers import wait_until
from tests.cloud_broker_worker.worker.conftest import OUTSIDE, TinyModel

WAIT_S = 30.0
WORKER = "worker-1"
DEVICE = "edge-1"


def verify_request(session: str, position: int, request: int = 0, branch: int = 0) -> Verify:
    """Return a request for the token after `position`; the worker rejects its draft."""
    return Verify(
        session=session,
        request=request,
        branch=branch,
        start=position,
        draft=(OUTSIDE,),
        deadline_ms=10_000,
    )


GARBAGE = {
    "nothing": b"",
    "not msgpack": b"\xc1\xc1\xc1",
    "cut off": b"\x85\xa4type",
    "a list": msgpack.packb([1, 2, 3]),
    "another type": msgpack.packb({"type": "sudo", "session": "s1"}),
    "a worker's message": msgpack.packb({"type": "gap", "session": "s1", "expected": 0}),
    "a field missing": msgpack.packb({"type": "verify", "session": "s1"}),
    "out of range": msgpack.packb(
        {
            "type": "verify",
            "session": "s1",
            "request": 0,
            "branch": 0,
            "start": -1,
            "draft": [1],
            "deadline_ms": 5,
        }
    ),
    "a claim of 4 GB": b"\xdd\xff\xff\xff\xff",
    "deep nesting": b"\x91" * 100_000,
    "oversized": b"\x00" * (MAX_ENVELOPE_BYTES + 1),
    "another session": encode(verify_request("s2", 0)),
    "a name that is none": msgpack.packb({"type": "close", "session": "../#"}),
}


class Device:
    """A device's side of the wire, by hand."""

    def __init__(self, transport: InMemoryTransport, bundle: Bundle) -> None:
        self.transport = transport
        self.answers: queue.Queue[ToDevice] = queue.Queue()
        self.statuses: queue.Queue[WorkerStatus] = queue.Queue()
        self._bundle_id = bundle.manifest.bundle_id
        transport.subscribe(
            topics.to_device(transport.name, "+"),
            lambda _, payload: self.answers.put(decode_to_device(payload)),
        )
        transport.subscribe(
            topics.WORKER_STATUS_FILTER,
            lambda _, payload: self.statuses.put(decode_status(payload, WorkerStatus)),
        )

    def opening(self, session: str, continues: Continuation | UnsetType = UNSET) -> Open:
        return Open(
            session=session,
            epoch=1,
            bundle_id=self._bundle_id,
            protocol=PROTOCOL,
            sampling=Sampling(),
            max_positions=64,
            deadline_ms=1000,
            continues=continues,
        )

    def open(self, session: str) -> ToDevice:
        topic = topics.open_session(self.transport.name)
        self.transport.publish(topic, encode(self.opening(session)), qos=1)
        return self.next_answer()

    def send(self, message: ToWorker) -> None:
        self.transport.publish(
            topics.to_worker(WORKER, self.transport.name, message.session), encode(message)
        )

    def next_answer(self) -> ToDevice:
        return self.answers.get(timeout=WAIT_S)

    def next_status(self) -> WorkerStatus:
        return self.statuses.get(timeout=WAIT_S)

    def ask(self, session: str, whole: TinyModel, num_positions: int = 6) -> None:
        """Open a session, upload some positions, and ask for the next token."""
        assert isinstance(self.open(session), Opened)
        self.upload_and_ask(session, whole, num_positions)

    def upload_and_ask(self, session: str, whole: TinyModel, num_positions: int = 6) -> None:
        """Upload some positions; the token after them must be the whole model's."""
        rows = whole.upload(list(range(10, 10 + num_positions)), 2)
        self.send(Context(session, pack_chunk(0, 0, rows)))
        self.send(verify_request(session, num_positions - 1))
        token = self.next_answer()
        assert isinstance(token, Verified), token
        assert token.token_id == int(whole.logits(rows, 2)[-1].argmax())


class Site:
    """One broker, one worker, and as many devices as a test wants."""

    def __init__(
        self,
        stack: ExitStack,
        bundle: Bundle,
        drain_timeout_s: float = WAIT_S,
        idle_after_s: float = 10.0,
    ) -> None:
        self.broker = InMemoryBroker()
        self._stack = stack
        self._bundle = bundle
        self.link = stack.enter_context(
            self.broker.connect(WORKER, Will(topics.worker_status(WORKER), Worker.will()))
        )
        config = WorkerConfig(
            num_threads=1, drain_timeout_s=drain_timeout_s, idle_after_s=idle_after_s
        )
        self.worker = stack.enter_context(Worker(self.link, bundle, config))

    def device(self, name: str = DEVICE) -> Device:
        return Device(self._stack.enter_context(self.broker.connect(name)), self._bundle)


@pytest.fixture
def site(cloud_bundle: Callable[[int], Bundle]) -> Iterator[Site]:
    with ExitStack() as stack:
        site = Site(stack, cloud_bundle(2))
        yield site
    site.worker.engine.pool.check_integrity()


def test_a_worker_serves_two_devices_at_once(site: Site, whole: TinyModel) -> None:
    site.device("edge-1").ask("s1", whole)
    site.device("edge-2").ask("s1", whole)


def test_a_worker_says_that_it_is_there_and_with_which_bundle(
    site: Site, cloud_bundle: Callable[[int], Bundle]
) -> None:
    status = site.device().next_status()
    assert status.online
    assert status.bundle_ids == (cloud_bundle(2).manifest.bundle_id,)


def test_a_worker_that_loses_its_link_is_offline_and_announces_itself_again(
    site: Site, whole: TinyModel
) -> None:
    device = site.device()
    born = device.next_status()
    site.link.drop()
    assert not device.next_status().online
    site.link.restore()
    assert device.next_status() == born
    device.ask("s1", whole)


def test_a_worker_that_is_stopped_says_so_and_its_thread_ends(
    cloud_bundle: Callable[[int], Bundle],
) -> None:
    broker = InMemoryBroker()
    with broker.connect(WORKER) as link, broker.connect(DEVICE) as other:
        device = Device(other, cloud_bundle(2))
        with Worker(link, cloud_bundle(2), WorkerConfig(num_threads=1)) as worker:
            assert device.next_status().online
        assert not device.next_status().online
        assert not worker.is_serving


@pytest.mark.parametrize("payload", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_on_any_topic_is_one_line_in_the_log_and_disturbs_no_device(
    site: Site, whole: TinyModel, payload: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    device = site.device()
    with caplog.at_level(logging.WARNING):
        for topic in (topics.open_session(DEVICE), topics.to_worker(WORKER, DEVICE, "s1")):
            for _ in range(20):
                device.transport.publish(topic, payload)
        device.ask("s3", whole)
    assert 1 <= len(caplog.records) <= 3
    assert all(
        "dropped" in record.message and "\n" not in record.message for record in caplog.records
    )
    assert device.answers.empty()


def test_a_topic_with_line_breaks_forges_no_line_of_the_log(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    hostile = topics.to_worker(WORKER, "edge-1\nCRITICAL all is lost", "s1" * 500)
    with caplog.at_level(logging.WARNING):
        site.device().transport.publish(hostile, encode(verify_request("s1", 0)))
        wait_until(lambda: bool(caplog.messages), "the worker has dropped it")
    (line,) = caplog.messages
    assert "\n" not in line
    assert "edge-1\\nCRITICAL" in line
    assert len(line) < 600


def test_sessions_of_a_device_that_went_offline_are_dropped(
    cloud_bundle: Callable[[int], Bundle], whole: TinyModel
) -> None:
    offline = encode_status(DeviceStatus(online=False, epoch=0))
    with ExitStack() as stack:
        site = Site(stack, cloud_bundle(2), idle_after_s=0.0)
        devices = [site.device(name) for name in (DEVICE, "edge-2")]
        for device in devices:
            device.ask("s1", whole)
        status = topics.device_status(DEVICE)
        devices[0].transport.publish(status, offline, qos=1, retain=True)
        wait_until(lambda: len(site.worker.engine.sessions) == 1, "its session is dropped")
        devices[1].ask("s2", whole)
        assert {key.device for key in site.worker.engine.sessions} == {"edge-2"}


def test_an_open_may_come_to_one_worker_and_no_other_message_to_all(
    site: Site, whole: TinyModel
) -> None:
    device = site.device()
    device.ask("s1", whole)
    device.send(Close("s1", keep=True))
    device.send(
        device.opening("s2", continues=Continuation(session="s1", branch=1, num_positions=4))
    )
    opened = device.next_answer()
    assert isinstance(opened, Opened)
    assert opened.received == 4
    device.transport.publish(
        topics.to_worker(WORKER, DEVICE, "s3"), encode(device.opening("s4"))
    )  # another session than that of the topic
    device.transport.publish(topics.open_session(DEVICE), encode(verify_request("s2", 0)))
    device.ask("s5", whole)
    assert device.answers.empty()


def test_a_replayed_message_of_a_session_is_dropped(site: Site, whole: TinyModel) -> None:
    device = site.device()
    device.transport.publish(
        topics.to_worker(WORKER, DEVICE, "s1"), encode(verify_request("s1", 0)), retain=True
    )
    assert isinstance(device.next_answer(), Refused)  # of the message as it was published
    site.link.drop()
    site.link.restore()
    device.ask("s2", whole)
    assert device.answers.empty()


def test_a_device_cannot_reach_a_session_of_another(site: Site, whole: TinyModel) -> None:
    victim = site.device("edge-1")
    other = site.device("edge-2")
    victim.ask("s1", whole)
    other.send(verify_request("s1", 5))
    refused = other.next_answer()
    assert isinstance(refused, Refused)
    assert refused.code == "unknown_session"
    assert victim.answers.empty()


def test_a_refusal_comes_to_the_device_that_asked(site: Site) -> None:
    device = site.device()
    device.send(Context("s7", pack_chunk(0, 0, np.zeros((1, 64), np.float16))))
    refused = device.next_answer()
    assert isinstance(refused, Refused)
    assert (refused.session, refused.code) == ("s7", "unknown_session")


def test_a_draining_worker_accepts_no_new_device_and_serves_its_sessions_to_their_end(
    site: Site, whole: TinyModel, cloud_bundle: Callable[[int], Bundle]
) -> None:
    old = site.device("edge-1")
    new = site.device("edge-2")
    old.ask("s1", whole)
    draining = threading.Thread(target=site.worker.drain, args=(threading.Event(),))
    draining.start()
    while not new.next_status().draining:
        pass
    message = Open(
        session="s2",
        epoch=1,
        bundle_id=cloud_bundle(2).manifest.bundle_id,
        protocol=PROTOCOL,
        sampling=Sampling(),
        max_positions=64,
        deadline_ms=1000,
    )
    (refused,) = (answer.message for answer in site.worker.engine.handle("edge-2", message, 0.0))
    assert isinstance(refused, Refused)
    assert (refused.code, refused.worker) == ("draining", WORKER)
    assert refused.retry_after_ms > 0
    old.send(verify_request("s1", 5, request=1, branch=1))
    assert isinstance(old.next_answer(), Verified)
    assert draining.is_alive()
    old.send(Close("s1"))
    draining.join(WAIT_S)
    assert not draining.is_alive()


def test_a_worker_does_not_wait_for_kept_sessions_before_it_stops(
    site: Site, whole: TinyModel
) -> None:
    device = site.device()
    device.ask("s1", whole)
    device.send(Close("s1", keep=True))
    wait_until(lambda: site.worker.engine.num_in_use == 0, "the session is kept")
    started = time.monotonic()
    site.worker.drain(threading.Event())
    assert time.monotonic() - started < WAIT_S / 2
    assert len(site.worker.engine.sessions) == 1


def test_sessions_that_are_left_when_a_worker_stops_are_sent_to_another(
    cloud_bundle: Callable[[int], Bundle], whole: TinyModel
) -> None:
    with ExitStack() as stack:
        site = Site(stack, cloud_bundle(2), drain_timeout_s=0.0)
        device = site.device()
        device.ask("s1", whole)
        site.worker.drain(threading.Event())
        site.worker.__exit__(None, None, None)
        refused = device.next_answer()
        assert isinstance(refused, Refused)
        assert refused.code == "draining"
        assert site.worker.engine.pool.used_bytes == 0


def test_a_worker_says_how_many_sessions_it_has(site: Site, whole: TinyModel) -> None:
    device = site.device()
    assert device.next_status().num_sessions == 0
    device.ask("s1", whole)
    while device.next_status().num_sessions != 1:
        pass


def revoke(site: Site, payload: bytes) -> None:
    with site.broker.connect("hub") as server:
        server.publish(topics.REVOKED, payload, qos=1, retain=True)


def test_a_device_that_is_denied_loses_its_session_and_gets_no_other(
    site: Site, whole: TinyModel
) -> None:
    denied = site.device("edge-1")
    other = site.device("edge-2")
    denied.ask("s1", whole)
    other.ask("s1", whole)
    revoke(site, encode_denylist(["edge-1"]))
    ended = denied.next_answer()
    assert isinstance(ended, Refused)
    assert (ended.code, ended.session, ended.retry_after_ms) == ("revoked", "s1", 0)
    refused = denied.open("s2")
    assert isinstance(refused, Refused)
    assert refused.code == "revoked"
    other.ask("s2", whole)


def test_a_worker_that_starts_later_knows_who_is_denied(
    cloud_bundle: Callable[[int], Bundle],
) -> None:
    broker = InMemoryBroker()
    with (
        broker.connect("hub") as server,
        broker.connect(WORKER) as link,
        broker.connect(DEVICE) as other,
    ):
        server.publish(topics.REVOKED, encode_denylist([DEVICE]), qos=1, retain=True)
        device = Device(other, cloud_bundle(2))
        with Worker(link, cloud_bundle(2), WorkerConfig(num_threads=1)):
            refused = device.open("s1")
    assert isinstance(refused, Refused)
    assert refused.code == "revoked"


def test_a_device_that_is_denied_no_more_is_served_again(site: Site, whole: TinyModel) -> None:
    device = site.device()
    revoke(site, encode_denylist([DEVICE]))
    assert isinstance(device.open("s1"), Refused)
    revoke(site, encode_denylist([]))
    device.ask("s2", whole)


def test_a_list_that_cannot_be_read_changes_nothing(site: Site, whole: TinyModel) -> None:
    device = site.device()
    revoke(site, encode_denylist([DEVICE]))
    revoke(site, b'{"none": true}')
    assert isinstance(device.open("s1"), Refused)


def test_one_devices_flood_leaves_room_for_the_others(tiny_bundle: Bundle) -> None:
    broker = InMemoryBroker()
    with broker.connect(WORKER) as link:
        worker = Worker(
            link, tiny_bundle, WorkerConfig(num_threads=1, max_queued_messages=16)
        )  # which takes none yet
        for _ in range(40):
            worker._on_message(topics.to_worker(WORKER, DEVICE, "s1"), encode(Close("s1")))
        assert worker.num_queued == 4
        for i in range(40):
            worker._on_message(topics.to_worker(WORKER, f"edge-{i + 2}", "s1"), encode(Close("s1")))
        assert worker.num_queued == 16
        worker._handle_queued(wait=False)
        worker._on_message(topics.to_worker(WORKER, DEVICE, "s1"), encode(Close("s1")))
        assert worker.num_queued == 1
