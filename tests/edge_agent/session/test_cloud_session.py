"""A device's session with a worker, against a scripted peer that speaks the real wire."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from edge_agent.measurements import Measurements
from edge_agent.session.cloud_session import CloudSession
from edge_agent.session.session_machine import MAX_HELD_POSITIONS
from edge_agent.session.worker_directory import WorkerDirectory
from fleet.protocol import topics
from fleet.protocol.codec import decode_to_worker, encode, unpack_chunk
from fleet.protocol.messages import (
    PROTOCOL,
    Close,
    Context,
    Gap,
    Open,
    Opened,
    Refused,
    Sampling,
    ToDevice,
    ToWorker,
    Verified,
    Verify,
)
from fleet.protocol.report import WorkerStatus, encode_status
from fleet.transport.base import Will
from fleet.transport.in_memory import InMemoryBroker, InMemoryTransport
from tests.brokers import wait_until

WAIT_S = 60.0
HIDDEN = 8
SESSION = "s1"
BUNDLE = "b1"
WINDOW = 1 << 20


class Peer:
    """The worker's end: the messages of the device, and the responses of the test."""

    def __init__(self, broker: InMemoryBroker, name: str = "w1") -> None:
        will = Will(topics.worker_status(name), encode_status(WorkerStatus(online=False, epoch=1)))
        self.transport = broker.connect(name, will)
        self.messages: queue.Queue[ToWorker] = queue.Queue()
        self.num_bytes = 0
        self.transport.subscribe(topics.OPEN_FILTER, self._on_message, qos=1)
        self.transport.subscribe(topics.sessions_of_worker(name), self._on_message)
        self.announce(epoch=1)

    def announce(self, epoch: int, *, draining: bool = False) -> None:
        status = WorkerStatus(online=True, epoch=epoch, bundle_ids=(BUNDLE,), draining=draining)
        self.transport.publish(
            topics.worker_status(self.transport.name), encode_status(status), qos=1, retain=True
        )

    def _on_message(self, topic: str, payload: bytes) -> None:
        self.num_bytes += len(payload)
        self.messages.put(decode_to_worker(payload))

    def next(self) -> ToWorker:
        return self.messages.get(timeout=WAIT_S)

    def say(self, message: ToDevice) -> None:
        self.transport.publish(topics.to_device("d1", SESSION), encode(message))

    def accept(self, max_chunk_bytes: int = 4096) -> None:
        assert isinstance(self.next(), Open)
        self.say(
            Opened(
                session=SESSION,
                worker=self.transport.name,
                received=0,
                max_chunk_bytes=max_chunk_bytes,
                window_bytes=WINDOW,
                dtypes=("float16",),
            )
        )


class Device:
    """A device's transport with one session on it."""

    def __init__(self, broker: InMemoryBroker, deadline_ms: int) -> None:
        self.transport: InMemoryTransport = broker.connect("d1")
        self.workers = WorkerDirectory(
            self.transport, lambda worker: self.cloud_session.worker_changed(worker)
        )
        self.measurements = Measurements()
        opening = Open(
            session=SESSION,
            epoch=1,
            bundle_id=BUNDLE,
            protocol=PROTOCOL,
            sampling=Sampling(),
            max_positions=128,
            deadline_ms=deadline_ms,
        )
        self.cloud_session = CloudSession(
            self.transport, self.workers, opening, HIDDEN, self.measurements
        )
        self.transport.subscribe(
            topics.to_device("d1", "+"), lambda _, payload: self.cloud_session.receive(payload)
        )
        self.workers.__enter__()
        assert self.workers.why_none(BUNDLE) is None


@pytest.fixture
def broker() -> InMemoryBroker:
    return InMemoryBroker()


@pytest.fixture
def peer(broker: InMemoryBroker) -> Iterator[Peer]:
    peer = Peer(broker)
    yield peer
    peer.transport.close()


@pytest.fixture
def device(broker: InMemoryBroker, peer: Peer) -> Iterator[Device]:
    device = Device(broker, deadline_ms=8000)
    yield device
    device.transport.close()


def rows(start: int, count: int) -> np.ndarray:
    return np.arange(start * HIDDEN, (start + count) * HIDDEN, dtype=np.float32).reshape(
        count, HIDDEN
    )


def test_context_that_was_offered_before_the_worker_responded_is_sent_after_it(
    device: Device, peer: Peer
) -> None:
    with device.cloud_session as cloud_session:
        cloud_session.offer(rows(0, 4))
        peer.accept()
        message = peer.next()
    assert isinstance(message, Context)
    assert (message.chunk.start, message.chunk.count) == (0, 4)
    np.testing.assert_array_equal(unpack_chunk(message.chunk, HIDDEN), rows(0, 4))


def test_chunks_keep_to_the_workers_limit_and_each_position_goes_once(
    device: Device, peer: Peer
) -> None:
    with device.cloud_session as cloud_session:
        cloud_session.offer(rows(0, 64)[:, :].repeat(1, 0))
        peer.accept(max_chunk_bytes=1024)
        first = peer.next()
    assert isinstance(first, Context)
    assert first.chunk.count == 64
    assert len(first.chunk.data) == 64 * HIDDEN * 2 <= 1024


def test_a_request_brings_the_context_that_it_needs(device: Device, peer: Peer) -> None:
    with device.cloud_session as cloud_session:
        peer.accept()
        cloud_session.offer(rows(0, 3))
        cloud_session.ask(1, [7, 8], [1])
        verify = peer.next()
        assert isinstance(verify, Verify)
        assert verify.chunk
        assert (verify.chunk.start, verify.chunk.count, verify.trusted) == (0, 3, (1,))
        peer.say(
            Verified(
                session=SESSION,
                request=verify.request,
                start=1,
                accepted=0,
                token_id=9,
                logprobs=(-0.5,),
            )
        )
        verdict = cloud_session.wait_response(WAIT_S)
        assert not cloud_session.has_request
    assert verdict is not None
    assert (verdict.accepted, verdict.token_id) == (0, 9)


def test_of_more_context_than_a_chunk_only_the_last_goes_with_the_request(
    device: Device, peer: Peer
) -> None:
    with device.cloud_session as cloud_session:
        peer.accept(max_chunk_bytes=1024)
        for start in range(0, 70, 35):  # 64 positions are a chunk
            cloud_session.offer(rows(start, 35))
        cloud_session.ask(68, [7, 8])
        counts = []
        while isinstance(message := peer.next(), Context):
            counts.append(message.chunk.count)
        assert isinstance(message, Verify)
        assert message.chunk
        assert sum(counts) + message.chunk.count == 70


def test_a_few_positions_wait_for_a_request_or_for_more(device: Device, peer: Peer) -> None:
    with device.cloud_session as cloud_session:
        peer.accept()
        for position in range(MAX_HELD_POSITIONS + 1):
            cloud_session.offer(rows(position, 1))
        context = peer.next()
        assert isinstance(context, Context)
        assert (context.chunk.start, context.chunk.count) == (0, MAX_HELD_POSITIONS + 1)
        cloud_session.offer(rows(MAX_HELD_POSITIONS + 1, 1))
        cloud_session.ask(MAX_HELD_POSITIONS + 1, [7])
        verify = peer.next()
        assert isinstance(verify, Verify)
        assert verify.chunk
        assert (verify.chunk.start, verify.chunk.count) == (MAX_HELD_POSITIONS + 1, 1)


def test_drafts_behind_a_request_wait_for_its_response(device: Device, peer: Peer) -> None:
    with device.cloud_session as cloud_session:
        peer.accept()
        cloud_session.offer(rows(0, 2))
        cloud_session.ask(1, [7])
        first = peer.next()
        assert isinstance(first, Verify)
        cloud_session.offer(rows(2, 9))
        peer.say(
            Verified(
                session=SESSION,
                request=first.request,
                start=1,
                accepted=1,
                token_id=None,
                logprobs=(-0.5,),
            )
        )
        assert cloud_session.wait_response(WAIT_S)
        context = peer.next()
        assert isinstance(context, Context)
        assert (context.chunk.start, context.chunk.count) == (2, 9)
    assert isinstance(peer.next(), Close)


def test_a_response_to_a_repeated_request_is_measured_too(
    broker: InMemoryBroker, peer: Peer
) -> None:
    device = Device(broker, deadline_ms=3000)
    with device.cloud_session as cloud_session:
        peer.accept()
        cloud_session.offer(rows(0, 1))
        cloud_session.ask(0, [7])
        first = peer.next()
        again = peer.next()
        assert isinstance(first, Verify)
        assert isinstance(again, Verify)
        assert first.chunk
        assert again == msgspec.structs.replace(first, chunk=None)
        peer.say(
            Verified(
                session=SESSION,
                request=again.request,
                start=0,
                accepted=1,
                token_id=None,
                logprobs=(-0.5,),
            )
        )
        assert cloud_session.wait_response(WAIT_S) is not None
    assert device.measurements.snapshot().num_round_trips == 1
    device.transport.close()


def test_a_gap_is_repaired_by_sending_again_from_there(device: Device, peer: Peer) -> None:
    with device.cloud_session as cloud_session:
        peer.accept()
        cloud_session.offer(rows(0, 5))
        assert isinstance(peer.next(), Context)
        peer.say(Gap(SESSION, 0, 1))
        again = peer.next()
    assert isinstance(again, Context)
    assert (again.chunk.start, again.chunk.count) == (1, 4)
    np.testing.assert_array_equal(unpack_chunk(again.chunk, HIDDEN), rows(1, 4))


def test_no_response_by_the_deadline_loses_the_session_and_the_rest_does_not_wait(
    broker: InMemoryBroker, peer: Peer
) -> None:
    device = Device(broker, deadline_ms=50)
    with device.cloud_session as cloud_session:
        cloud_session.offer(rows(0, 1))
        cloud_session.ask(0, [7], is_optional=True)
        assert cloud_session.wait_response(WAIT_S) is None
        assert not cloud_session.has_request
        assert not cloud_session.is_available
        assert cloud_session.note is not None
        assert "in time" in cloud_session.note
    device.transport.close()


def test_a_refusal_ends_the_wait_at_once_and_says_why(device: Device, peer: Peer) -> None:
    with device.cloud_session as cloud_session:
        assert isinstance(peer.next(), Open)
        peer.say(
            Refused(
                session=SESSION,
                code="busy",
                retry_after_ms=1000,
                message="no memory for 64 positions",
            )
        )
        cloud_session.offer(rows(0, 1))
        cloud_session.ask(0, [7], is_optional=True)
        assert cloud_session.wait_response(WAIT_S) is None
        assert cloud_session.note is not None
        assert "no memory" in cloud_session.note


def test_one_workers_final_refusal_is_not_final_while_another_serves(
    broker: InMemoryBroker, device: Device, peer: Peer
) -> None:
    other = Peer(broker, "w2")
    wait_until(lambda: "w2" in device.workers.statuses, "the other is known")
    with device.cloud_session as cloud_session:
        assert isinstance(peer.next(), Open)
        peer.say(
            Refused(
                session=SESSION,
                code="busy",
                retry_after_ms=0,
                message="never enough memory",
                worker="w1",
            )
        )
        assert isinstance(peer.next(), Open), "it asks again"
        assert cloud_session.refusal is None
        other.say(
            Refused(
                session=SESSION,
                code="protocol_mismatch",
                retry_after_ms=0,
                message="another protocol",
                worker="w2",
            )
        )
        wait_until(lambda: cloud_session.refusal is not None, "no worker is left")
    other.transport.close()


def test_a_refusal_of_the_protocol_is_logged_once_by_the_device(
    device: Device, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    text = "the worker speaks protocol 5, the device protocol 4: update the device"
    refused = Refused(
        session=SESSION, code="protocol_mismatch", retry_after_ms=0, message=text, worker="w1"
    )
    with device.cloud_session as cloud_session:
        for _ in range(2):
            assert isinstance(peer.next(), Open)
            peer.say(refused)
        wait_until(lambda: cloud_session.refusal is not None, "the refusal is final")
    lines = [record.getMessage() for record in caplog.records if text in record.getMessage()]
    assert lines == [f"no cloud for this device: {text}"]


@pytest.mark.parametrize("gone", ["killed", "restarted"])
def test_a_worker_that_goes_away_ends_the_wait_at_once(
    device: Device, peer: Peer, gone: str
) -> None:
    with device.cloud_session as cloud_session:
        peer.accept()
        cloud_session.offer(rows(0, 4))
        assert isinstance(peer.next(), Context)
        if gone == "killed":
            peer.transport.drop()
        else:
            peer.announce(epoch=2)
        cloud_session.ask(0, [7], is_optional=True)
        assert cloud_session.wait_response(WAIT_S) is None
        assert cloud_session.note is not None
        assert "went away" in cloud_session.note


def test_a_second_worker_that_accepted_the_session_gets_a_close(
    broker: InMemoryBroker, device: Device, peer: Peer
) -> None:
    second = Peer(broker, "w2")
    with device.cloud_session:
        peer.accept()
        device.cloud_session.offer(rows(0, 4))
        assert isinstance(peer.next(), Context)
        second.accept()
        assert isinstance(second.next(), Close)
    second.transport.close()


def test_every_uploaded_byte_is_counted(device: Device, peer: Peer) -> None:
    with device.cloud_session as cloud_session:
        peer.accept()
        cloud_session.offer(rows(0, 4))
        assert isinstance(peer.next(), Context)
    assert isinstance(peer.next(), Close)
    assert cloud_session.bytes_up == peer.num_bytes


def test_a_cut_link_is_a_lost_session_not_a_crash(device: Device, peer: Peer) -> None:
    with device.cloud_session as cloud_session:
        peer.accept()
        cloud_session.offer(rows(0, 4))
        assert isinstance(peer.next(), Context)
        device.transport.drop()
        cloud_session.ask(0, [7], is_optional=True)
        assert cloud_session.wait_response(WAIT_S) is None
        assert cloud_session.note is not None
        assert "link" in cloud_session.note


def test_a_lost_session_is_opened_again_and_goes_on_where_the_worker_is(
    device: Device, peer: Peer
) -> None:
    with device.cloud_session as cloud_session:
        peer.accept()
        cloud_session.offer(rows(0, 4))
        assert isinstance(peer.next(), Context)
        peer.say(
            Refused(
                session=SESSION,
                code="unknown_session",
                retry_after_ms=0,
                message="open it again",
                worker="w1",
            )
        )
        opening = peer.next()
        assert isinstance(opening, Open)
        assert opening.session == SESSION
        peer.say(
            Opened(
                session=SESSION,
                worker="w1",
                received=1,
                max_chunk_bytes=4096,
                window_bytes=WINDOW,
                dtypes=("float16",),
            )
        )
        cloud_session.ask(3, [7])
        again = peer.next()
        assert isinstance(again, Verify)
        assert again.chunk
        assert (again.chunk.start, again.chunk.count) == (1, 3)


def test_a_verify_outlives_the_worker_and_is_sent_anew_to_the_next(
    broker: InMemoryBroker, device: Device, peer: Peer
) -> None:
    with device.cloud_session as cloud_session:
        peer.accept()
        cloud_session.offer(rows(0, 3))
        cloud_session.ask(1, [7, 8])
        first = peer.next()
        assert isinstance(first, Verify)
        second = Peer(broker, "w2")
        peer.transport.drop()
        second.accept()
        again = second.next()
        assert isinstance(again, Verify)
        assert again.chunk
        assert again.chunk.start == 0
        assert again.request != first.request
        peer.transport.restore()
        peer.say(
            Verified(
                session=SESSION,
                request=first.request,
                start=1,
                accepted=0,
                token_id=99,
                logprobs=(-1.0,),
            )
        )
        second.say(
            Verified(
                session=SESSION,
                request=again.request,
                start=1,
                accepted=2,
                token_id=None,
                logprobs=(-1.0, -1.0),
            )
        )
        verdict = cloud_session.wait_response(WAIT_S)
    assert verdict is not None
    assert verdict.accepted == 2
    second.transport.close()


def test_another_workers_refusal_does_not_disturb_an_open_session(
    device: Device, peer: Peer
) -> None:
    with device.cloud_session as cloud_session:
        peer.accept()
        peer.say(
            Refused(
                session=SESSION, code="busy", retry_after_ms=1000, message="no room", worker="w9"
            )
        )
        cloud_session.offer(rows(0, 4))
        assert isinstance(peer.next(), Context)
        assert cloud_session.is_open


def test_a_rejection_begins_a_branch_that_the_next_opening_names(
    device: Device, peer: Peer
) -> None:
    with device.cloud_session as cloud_session:
        peer.accept()
        cloud_session.offer(rows(0, 4))
        assert isinstance(peer.next(), Context)
        cloud_session.rewind(2)
        cloud_session.offer(rows(7, 4))
        context = peer.next()
        assert isinstance(context, Context)
        assert (context.chunk.branch, context.chunk.start, context.chunk.count) == (1, 2, 4)
        peer.announce(epoch=2)
        opening = peer.next()
        assert isinstance(opening, Open)
        assert opening.branch == 1


def test_a_draining_worker_is_left_when_another_serves(
    broker: InMemoryBroker, device: Device, peer: Peer
) -> None:
    with device.cloud_session:
        peer.accept()
        second = Peer(broker, "w2")
        peer.announce(epoch=1, draining=True)
        assert isinstance(peer.next(), Close)  # so that it need not wait
        second.accept()
        assert isinstance(peer.next(), Open)
    second.transport.close()


def test_a_verify_that_was_withdrawn_leaves_a_branch_on_which_no_worker_can_be(
    device: Device, peer: Peer
) -> None:
    with device.cloud_session as cloud_session:
        peer.accept()
        cloud_session.offer(rows(0, 3))
        cloud_session.ask(1, [7, 8])
        assert isinstance(peer.next(), Verify)
        cloud_session.withdraw()
        peer.announce(epoch=2)
        opening = peer.next()
        assert isinstance(opening, Open)
        assert opening.branch > 1  # where a worker that rejected the draft would be
