"""The session's rules, message by message, without a thread, a clock or a transport."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import msgspec
import numpy as np
import pytest
from msgspec import UNSET, UnsetType

from edge_agent.measurements import Measurements
from edge_agent.session.session_machine import (
    MAX_HELD_POSITIONS,
    NUM_TRIES,
    OutgoingMessage,
    SessionMachine,
)
from fleet.protocol import topics
from fleet.protocol.codec import unpack_chunk
from fleet.protocol.messages import (
    PROTOCOL,
    Close,
    Context,
    Continuation,
    Gap,
    Open,
    Opened,
    Received,
    Refused,
    Sampling,
    ToDevice,
    Verified,
    Verify,
)
from fleet.protocol.report import WorkerStatus
from fleet.protocol.session import LinkState

HIDDEN: Final = 8
ROW_BYTES: Final = 2 * HIDDEN
DEADLINE_S: Final = 6.0
RETRY_S: Final = DEADLINE_S / NUM_TRIES
ONLINE: Final = WorkerStatus(online=True, epoch=1, bundle_ids=("b1",))
OPENED: Final = Opened(
    session="s1",
    worker="w1",
    received=0,
    max_chunk_bytes=1024,
    window_bytes=1024,
    dtypes=("float16",),
)
REFUSED: Final = Refused(
    session="s1", code="busy", retry_after_ms=1000, message="no room", worker="w1"
)


def rows(start: int, count: int) -> np.ndarray:
    values = np.arange(start * HIDDEN, (start + count) * HIDDEN, dtype=np.float32)
    return values.reshape(count, HIDDEN)


class Driver:
    """A machine and the time; `random` 1 makes every back-off its longest."""

    def __init__(
        self,
        continues: Continuation | UnsetType = UNSET,
        continued_worker: str | None = None,
    ) -> None:
        self.now = 0.0
        self.measurements = Measurements()
        opening = Open(
            session="s1",
            epoch=1,
            bundle_id="b1",
            protocol=PROTOCOL,
            sampling=Sampling(),
            max_positions=256,
            deadline_ms=int(1000 * DEADLINE_S),
            continues=continues,
        )
        self.machine = SessionMachine(
            opening,
            "d1",
            HIDDEN,
            self.measurements,
            lambda: 1.0,
            continued_worker=continued_worker,
        )
        self.observe()

    def observe(
        self, workers: Mapping[str, WorkerStatus] | None = None, *, is_link_up: bool = True
    ) -> None:
        online = {"w1": ONLINE} if workers is None else workers
        self.machine.observe(online, is_link_up=is_link_up)

    def receive(self, message: ToDevice) -> None:
        self.machine.receive(message, self.now)

    def ask(self, start: int, draft: tuple[int, ...], **options: Any) -> None:
        self.machine.ask(start, draft, now=self.now, **options)

    def sent(self) -> list[OutgoingMessage]:
        """Everything that is due now."""
        messages = []
        while message := self.machine.next_message(self.now):
            messages.append(message)
        return messages

    def bodies(self) -> list[object]:
        return [message.body for message in self.sent()]

    def verify(self) -> Verify:
        """The one message that is due, a verify request."""
        (body,) = self.bodies()
        assert isinstance(body, Verify)
        return body

    def wait(self) -> float:
        """Let the time pass until a message may be due; return how long that was."""
        waited = self.machine.next_deadline(self.now) - self.now
        assert 0 < waited < math.inf
        self.now += waited
        return waited

    def response(self, request: Verify, accepted: int, token_id: int | None = None) -> Verified:
        return Verified(
            session="s1",
            request=request.request,
            start=request.start,
            accepted=accepted,
            token_id=token_id,
            logprobs=(-0.5,) * (accepted + (token_id is not None)),
        )


@pytest.fixture
def idle() -> Driver:
    return Driver()


@pytest.fixture
def opening(idle: Driver) -> Driver:
    assert len(idle.sent()) == 1
    return idle


@pytest.fixture
def opened(opening: Driver) -> Driver:
    opening.receive(OPENED)
    return opening


def spans(bodies: Iterable[object]) -> list[tuple[int, int]]:
    chunks = [getattr(body, "chunk", None) for body in bodies]
    return [(chunk.start, chunk.start + chunk.count) for chunk in chunks if chunk]


# Opening.


def test_the_first_message_opens_the_session_with_qos_1_and_is_repeated_until_its_deadline(
    idle: Driver,
) -> None:
    (message,) = idle.sent()
    assert message.topic.endswith("/open/d1")
    assert (message.qos, isinstance(message.body, Open)) == (1, True)
    for _ in range(NUM_TRIES - 1):
        assert idle.wait() == pytest.approx(RETRY_S)
        assert idle.sent() == [message]
    idle.wait()
    assert idle.sent() == []
    assert idle.machine.state is LinkState.LOST


@pytest.mark.parametrize(
    ("is_link_up", "status"),
    [
        (False, ONLINE),
        (True, msgspec.structs.replace(ONLINE, bundle_ids=("b2",))),
        (True, msgspec.structs.replace(ONLINE, draining=True)),
    ],
    ids=["no link", "another bundle", "draining"],
)
def test_a_session_that_cannot_be_served_is_not_opened(
    idle: Driver, is_link_up: bool, status: WorkerStatus
) -> None:
    idle.observe({"w1": status}, is_link_up=is_link_up)
    assert idle.sent() == []
    assert idle.machine.next_deadline(idle.now) == math.inf
    assert idle.machine.is_available == (status is ONLINE)


def test_a_lost_session_is_opened_again_after_a_back_off_that_doubles(opening: Driver) -> None:
    waits = []
    for _ in range(4):
        opening.receive(msgspec.structs.replace(REFUSED, code="internal", retry_after_ms=0))
        waits.append(opening.wait())
        assert isinstance(opening.bodies()[0], Open)
    assert waits == pytest.approx([0.25, 0.5, 1.0, 2.0])
    assert opening.measurements.snapshot().num_losses == 4


@pytest.mark.parametrize(
    ("code", "retry_after_ms", "expected_s"),
    [("busy", 3000, 3.0), ("draining", 3000, 0.25), ("busy", 0, 0.25)],
)
def test_a_refusal_names_the_time_before_the_next_open(
    opening: Driver, code: str, retry_after_ms: int, expected_s: float
) -> None:
    opening.receive(msgspec.structs.replace(REFUSED, code=code, retry_after_ms=retry_after_ms))
    assert opening.wait() == pytest.approx(expected_s)
    assert opening.machine.note == f"the worker refused ({code}): no room"


@pytest.mark.parametrize(
    ("code", "retry_after_ms", "workers", "is_final"),
    [
        ("protocol_mismatch", 0, ("w1",), True),
        ("protocol_mismatch", 0, ("w1", "w2"), False),
        ("busy", 1000, ("w1",), False),
        ("internal", 0, ("w1",), False),
        ("unknown_session", 0, ("w1",), False),
        ("bundle_mismatch", 0, ("w1",), False),  # w1 serves the bundle: another worker said so
    ],
)
def test_a_refusal_is_final_when_no_other_worker_is_left_to_ask(
    opening: Driver, code: str, retry_after_ms: int, workers: tuple[str, ...], is_final: bool
) -> None:
    opening.observe(dict.fromkeys(workers, ONLINE))
    refused = msgspec.structs.replace(REFUSED, code=code, retry_after_ms=retry_after_ms)
    opening.receive(refused)
    assert opening.machine.refusal == (refused if is_final else None)


def test_an_open_session_ends_the_memory_of_refusals(opening: Driver) -> None:
    opening.receive(msgspec.structs.replace(REFUSED, retry_after_ms=0))
    assert opening.machine.refusal
    opening.receive(OPENED)
    assert opening.machine.refusal is None


def test_a_second_worker_that_accepts_the_session_gets_a_close(opened: Driver) -> None:
    opened.receive(msgspec.structs.replace(OPENED, worker="w2"))
    opened.receive(OPENED)
    (message,) = opened.sent()
    assert (message.topic.split("/")[-3], message.body) == ("w2", Close("s1"))
    assert opened.machine.worker == "w1"


# Context.


@pytest.mark.parametrize(
    ("num_rows", "expected"),
    [
        (MAX_HELD_POSITIONS, []),
        (MAX_HELD_POSITIONS + 1, [(0, MAX_HELD_POSITIONS + 1)]),
        (64, [(0, 64)]),
        (65, [(0, 64)]),  # the rest is as large as the window of 64 rows
    ],
)
def test_context_goes_in_chunks_within_the_window_and_a_few_positions_wait(
    opened: Driver, num_rows: int, expected: list[tuple[int, int]]
) -> None:
    opened.machine.offer(rows(0, num_rows))
    assert spans(opened.bodies()) == expected


def test_a_receipt_makes_room_in_the_window(opened: Driver) -> None:
    opened.machine.offer(rows(0, 100))
    assert spans(opened.bodies()) == [(0, 64)]
    opened.receive(Received("s1", 1, 40))  # of another branch
    assert opened.bodies() == []
    opened.receive(Received("s1", 0, 40))
    assert spans(opened.bodies()) == [(64, 100)]


def test_a_window_that_stays_full_is_sent_again_after_a_third_of_the_deadline(
    opened: Driver,
) -> None:
    opened.machine.offer(rows(0, 100))
    assert spans(opened.bodies()) == [(0, 64)]
    assert opened.wait() == pytest.approx(RETRY_S)
    assert spans(opened.bodies()) == [(0, 64)]


def test_a_gap_moves_the_upload_back(opened: Driver) -> None:
    opened.machine.offer(rows(0, 10))
    opened.sent()
    opened.receive(Gap("s1", 0, 4))
    (body,) = opened.bodies()
    assert isinstance(body, Context)
    np.testing.assert_array_equal(unpack_chunk(body.chunk, HIDDEN), rows(4, 6))


def test_another_worker_gets_what_it_lacks(opened: Driver) -> None:
    opened.machine.offer(rows(0, 10))
    opened.sent()
    opened.receive(msgspec.structs.replace(REFUSED, code="unknown_session", retry_after_ms=0))
    opened.wait()
    assert isinstance(opened.bodies()[0], Open)
    opened.receive(msgspec.structs.replace(OPENED, worker="w2", received=3))
    (message,) = opened.sent()
    assert message.topic.split("/")[-3] == "w2"
    assert spans([message.body]) == [(3, 10)]


# Requests.


def test_a_request_brings_the_last_of_its_context(opened: Driver) -> None:
    opened.machine.offer(rows(0, 3))
    opened.ask(1, (7, 8), trusted=(1,))
    body = opened.verify()
    assert spans([body]) == [(0, 3)]
    assert (body.request, body.branch, body.start, body.trusted) == (0, 0, 1, (1,))


def test_of_two_chunks_the_last_comes_with_the_request(opened: Driver) -> None:
    opened.machine.offer(rows(0, 60))
    opened.sent()
    opened.receive(Received("s1", 0, 60))
    opened.machine.offer(rows(60, 20))
    opened.ask(79, (7,))
    body = opened.verify()
    assert spans([body]) == [(60, 80)]


def test_drafts_behind_a_pending_request_wait_for_its_response(opened: Driver) -> None:
    opened.machine.offer(rows(0, 2))
    opened.ask(1, (7,))
    request = opened.verify()
    opened.machine.offer(rows(2, 9))
    assert opened.bodies() == []
    opened.receive(opened.response(request, accepted=1))
    assert spans(opened.bodies()) == [(2, 11)]


def test_a_request_is_repeated_without_its_context_and_then_loses_the_session(
    opened: Driver,
) -> None:
    opened.machine.offer(rows(0, 1))
    opened.ask(0, (7,))
    first = opened.verify()
    for _ in range(NUM_TRIES - 1):
        assert opened.wait() == pytest.approx(first.deadline_ms / 1000 / NUM_TRIES)
        assert opened.verify() == msgspec.structs.replace(first, chunk=None)
    opened.wait()
    assert opened.bodies() == []
    assert opened.machine.state is LinkState.LOST
    assert opened.machine.has_request, "it waits for the next worker"


def test_a_response_is_taken_once_and_its_time_counts_from_the_first_request(
    opened: Driver,
) -> None:
    opened.machine.offer(rows(0, 1))
    opened.ask(0, (7,))
    request = opened.verify()
    opened.now += 2.5
    assert opened.verify()
    response = opened.response(request, accepted=0, token_id=9)
    for _ in range(2):
        opened.receive(response)
    assert opened.machine.take_response(opened.now) == response
    assert opened.machine.take_response(opened.now) is None
    snapshot = opened.measurements.snapshot()
    assert snapshot.num_round_trips == 1
    assert snapshot.round_trip_s == pytest.approx(2.5)


def test_a_request_is_new_to_another_worker_and_a_late_response_of_the_first_is_dropped(
    opened: Driver,
) -> None:
    opened.machine.offer(rows(0, 3))
    opened.ask(1, (7, 8))
    first = opened.verify()
    opened.observe({"w2": ONLINE})
    opened.machine.worker_changed("w1", opened.now)
    assert isinstance(opened.bodies()[0], Open), "at once"
    opened.receive(msgspec.structs.replace(OPENED, worker="w2"))
    second = opened.verify()
    assert second.request == first.request + 1
    assert spans([second]) == [(0, 3)]
    opened.receive(opened.response(first, accepted=2))
    assert opened.machine.take_response(opened.now) is None
    opened.receive(opened.response(second, accepted=2))
    assert opened.machine.take_response(opened.now) is not None


def lose_by_deadline(driver: Driver) -> None:
    driver.now = driver.machine.abandon_at
    assert driver.machine.take_response(driver.now) is None


def lose_by_link(driver: Driver) -> None:
    driver.observe(is_link_up=False)
    assert driver.bodies() == []


def lose_by_publish(driver: Driver) -> None:
    driver.machine.publish_failed(driver.now)


def lose_by_refusal(driver: Driver) -> None:
    driver.receive(REFUSED)


def lose_by_restart(driver: Driver) -> None:
    driver.observe({"w1": msgspec.structs.replace(ONLINE, epoch=2)})
    driver.machine.worker_changed("w1", driver.now)


LOSSES: dict[str, tuple[Callable[[Driver], None], str]] = {
    "deadline": (lose_by_deadline, "no verdict of the cloud came within"),
    "link": (lose_by_link, "link to the broker"),
    "publish": (lose_by_publish, "link to the broker"),
    "refusal": (lose_by_refusal, "no room"),
    "restart": (lose_by_restart, "went away"),
}


@pytest.mark.parametrize(("lose", "note"), LOSSES.values(), ids=LOSSES.keys())
def test_an_optional_request_ends_with_the_session_and_leaves_a_branch_of_its_own(
    opened: Driver, lose: Callable[[Driver], None], note: str
) -> None:
    opened.machine.offer(rows(0, 1))
    opened.ask(0, (7,), is_optional=True)
    opened.verify()
    lose(opened)
    machine = opened.machine
    assert machine.state is LinkState.LOST
    assert not machine.has_request
    assert not machine.is_available
    assert machine.note is not None
    assert note in machine.note
    assert (machine.num_assists, machine.num_verifies) == (1, 0)
    opened.observe()
    opened.now += 10
    (opening,) = opened.bodies()
    assert isinstance(opening, Open)
    assert opening.branch == 2


def test_an_optional_request_is_not_made_while_the_session_is_lost(opened: Driver) -> None:
    opened.receive(REFUSED)
    opened.ask(0, (7,), is_optional=True)
    assert not opened.machine.has_request
    opened.ask(0, (7,))
    assert opened.machine.has_request


def test_a_deadline_grows_with_the_positions_that_have_not_arrived(opened: Driver) -> None:
    opened.machine.offer(rows(0, 20))
    opened.ask(19, (7,), deadline_ms=100)
    assert opened.verify().deadline_ms == 300


def test_a_rewind_begins_the_next_branch(opened: Driver) -> None:
    opened.machine.offer(rows(0, 4))
    opened.sent()
    opened.machine.rewind(2)
    opened.machine.offer(rows(7, 4))
    (body,) = opened.bodies()
    assert isinstance(body, Context)
    assert (body.chunk.branch, body.chunk.start, body.chunk.count) == (1, 2, 4)


# Workers that change, and the end.


@pytest.mark.parametrize(
    ("workers", "state"),
    [
        ({"w1": ONLINE}, LinkState.OPEN),
        ({"w2": ONLINE}, LinkState.LOST),
        ({"w1": msgspec.structs.replace(ONLINE, epoch=2)}, LinkState.LOST),
        ({"w1": msgspec.structs.replace(ONLINE, draining=True)}, LinkState.OPEN),
        ({"w1": msgspec.structs.replace(ONLINE, draining=True), "w2": ONLINE}, LinkState.LOST),
    ],
    ids=["the same", "gone", "restarted", "draining alone", "draining next to another"],
)
def test_a_session_leaves_a_worker_that_cannot_keep_it(
    opened: Driver, workers: dict[str, WorkerStatus], state: LinkState
) -> None:
    opened.observe(workers)
    opened.machine.worker_changed("w2", opened.now)
    assert opened.machine.is_open
    opened.machine.worker_changed("w1", opened.now)
    assert opened.machine.state is state


def test_another_workers_refusal_does_not_disturb_an_open_session(opened: Driver) -> None:
    opened.receive(msgspec.structs.replace(REFUSED, worker="w9"))
    assert opened.machine.is_open


@pytest.mark.parametrize("is_abandoned", [False, True])
def test_the_last_message_closes_the_session_at_its_worker(
    opened: Driver, is_abandoned: bool
) -> None:
    opened.machine.offer(rows(0, 10))
    opened.ask(9, (7,))
    if is_abandoned:
        opened.machine.abandon("cancelled")
    opened.machine.close()
    assert opened.bodies() == [Close("s1")]
    assert opened.machine.next_deadline(opened.now) == math.inf
    assert opened.machine.note == ("cancelled" if is_abandoned else None)


def test_a_worker_that_accepts_a_session_after_its_end_gets_a_close(opening: Driver) -> None:
    opening.machine.close()
    assert opening.bodies() == []
    opening.receive(OPENED)
    assert opening.bodies() == [Close("s1")]


def test_an_open_session_with_nothing_to_do_is_idle(opened: Driver) -> None:
    idle = [opened.machine.is_idle]
    assert opened.machine.next_deadline(opened.now) == math.inf
    opened.machine.offer(rows(0, 10))
    idle.append(opened.machine.is_idle)
    opened.sent()
    idle.append(opened.machine.is_idle)
    assert idle == [True, False, True]


# Continued sessions.

CONTINUES: Final = Continuation(session="s0", branch=2, num_positions=9)


@pytest.fixture
def continuing() -> Driver:
    """A machine that has sent its first `Open`, which continues a session of worker w1."""
    driver = Driver(continues=CONTINUES, continued_worker="w1")
    driver.observe({"w1": ONLINE, "w2": ONLINE})
    (message,) = driver.sent()
    assert message.topic == topics.to_worker("w1", "d1", "s1")
    assert (message.qos, message.body.continues) == (1, CONTINUES)  # type: ignore[union-attr]
    return driver


def test_a_continued_session_uploads_what_its_worker_lacks_also_if_it_opens_before_the_prompt_ran(
    continuing: Driver,
) -> None:
    continuing.receive(msgspec.structs.replace(OPENED, received=9))
    continuing.machine.offer(rows(0, 6))
    assert continuing.bodies() == []
    continuing.receive(Received("s1", 0, 9))  # a late receipt
    continuing.machine.offer(rows(6, 8))
    assert spans(continuing.bodies()) == [(9, 14)]


def test_a_worker_cannot_claim_more_positions_than_it_was_offered(continuing: Driver) -> None:
    continuing.receive(msgspec.structs.replace(OPENED, received=200))
    continuing.machine.offer(rows(0, 14))
    assert spans(continuing.bodies()) == [(9, 14)]


def test_after_one_try_any_worker_may_open_it_and_the_earlier_session_is_closed(
    continuing: Driver,
) -> None:
    assert continuing.wait() == pytest.approx(RETRY_S)
    (message,) = continuing.sent()
    assert message.topic == topics.open_session("d1")
    assert message.body.continues == CONTINUES  # type: ignore[union-attr]
    continuing.receive(msgspec.structs.replace(OPENED, worker="w2"))
    messages = [(message.topic, message.body) for message in continuing.sent()]
    assert messages == [
        (topics.to_worker("w1", "d1", session), Close(session)) for session in ("s1", "s0")
    ]


def test_after_a_refusal_any_worker_may_open_it_at_once(continuing: Driver) -> None:
    continuing.receive(msgspec.structs.replace(REFUSED, code="draining"))
    assert continuing.machine.is_available
    assert continuing.measurements.snapshot().num_losses == 0
    (message,) = continuing.sent()
    assert message.topic == topics.open_session("d1")


def test_a_worker_without_the_earlier_positions_gets_all_and_closes_the_rest(
    continuing: Driver,
) -> None:
    continuing.receive(OPENED)
    continuing.machine.offer(rows(0, 14))
    assert continuing.bodies()[0] == Close("s0")
    continuing.machine.ask(13, (7,), now=0.0)
    assert continuing.machine.worker == "w1"


def test_a_session_that_is_kept_ends_with_its_branch_and_what_was_sent(opened: Driver) -> None:
    opened.machine.offer(rows(0, 10))
    opened.sent()
    opened.machine.offer(rows(10, 2))  # held back
    opened.machine.rewind(11)
    end = opened.machine.keep()
    assert end == Continuation(session="s1", branch=1, num_positions=10)
    assert opened.bodies() == [Close("s1", keep=True)]
    assert opened.machine.is_closed
    opened.machine.close()
    assert opened.bodies() == []


def test_a_session_with_a_request_or_without_positions_is_not_kept(opened: Driver) -> None:
    assert Driver().machine.keep() is None
    assert opened.machine.keep() is None
    opened.machine.offer(rows(0, 2))
    opened.ask(1, (7,))
    assert opened.machine.keep() is None
    opened.machine.close()
    assert opened.bodies() == [Close("s1")]
