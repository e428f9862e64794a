"""Kept sessions: which one a prompt continues, and when a worker learns that one is forgotten."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import pytest

from edge_agent.session.kept_sessions import MAX_KEPT_SESSIONS, KeptSession, KeptSessions
from edge_agent.session.worker_directory import WorkerDirectory
from fleet.protocol import topics
from fleet.protocol.codec import decode_to_worker
from fleet.protocol.messages import Close, Continuation
from fleet.protocol.report import WorkerStatus, encode_status
from fleet.transport.in_memory import InMemoryBroker
from tests.brokers import wait_until

PROMPT: Final = list(range(20))


class House:
    """A device with kept sessions, and the workers' side of its broker."""

    def __init__(self, broker: InMemoryBroker) -> None:
        self.closed: queue.Queue[tuple[str, str]] = queue.Queue()
        self._server = broker.connect("server").__enter__()
        self._server.subscribe(topics.TO_WORKER_FILTER, self._on_message)
        self._link = broker.connect("d1").__enter__()
        self._workers = WorkerDirectory(self._link, self._worker_changed).__enter__()
        self.kept = KeptSessions(self._link, self._workers, upload_layer=2)
        self.announce("w1")

    def announce(self, worker: str, epoch: int = 1, *, draining: bool = False) -> None:
        status = WorkerStatus(online=True, epoch=epoch, bundle_ids=("b1",), draining=draining)
        topic = topics.worker_status(worker)
        self._server.publish(topic, encode_status(status), qos=1, retain=True)
        wait_until(lambda: self._workers.statuses.get(worker) == status, "the device knows")

    def keep(
        self, session: str, token_ids: Sequence[int] = PROMPT, app: str = "app", layer: int = 2
    ) -> KeptSession:
        kept = KeptSession(
            app=app,
            session=session,
            worker="w1",
            worker_epoch=1,
            branch=3,
            upload_layer=layer,
            token_ids=np.array(token_ids, np.int64),
        )
        self.kept.keep(kept)
        return kept

    def taken(self, token_ids: Sequence[int] = PROMPT, app: str = "app", layer: int = 2) -> str:
        taken = self.kept.take(app, token_ids, layer)
        return taken.kept.session if taken else ""

    def _worker_changed(self, worker: str) -> None:
        self.kept.worker_changed(worker)

    def _on_message(self, topic: str, payload: bytes) -> None:
        message = decode_to_worker(payload)
        assert message == Close(message.session)
        self.closed.put((topic.split("/")[-3], message.session))

    def close(self) -> None:
        self._workers.__exit__()
        self._link.__exit__(None, None, None)
        self._server.__exit__(None, None, None)


@pytest.fixture
def house() -> Iterator[House]:
    house = House(InMemoryBroker())
    yield house
    house.close()


def test_the_session_with_the_longest_common_beginning_is_continued_once(house: House) -> None:
    house.keep("short", PROMPT[:8])
    house.keep("long", [*PROMPT[:15], 99])
    taken = house.kept.take("app", PROMPT, 2)
    assert taken is not None
    assert taken.continuation == Continuation(session="long", branch=3, num_positions=15)
    assert house.taken() == "short"
    assert house.taken() == ""


def test_a_session_that_would_lose_most_of_its_positions_is_left(house: House) -> None:
    house.keep("other", [*PROMPT[:4], *range(50, 60)])  # both begin with the system prompt
    assert house.taken() == ""
    assert house.kept.is_kept("other", "w1")
    assert not house.kept.is_kept("other", "w2")


@pytest.mark.parametrize(("app", "layer"), [("another", 2), ("app", 1)])
def test_another_app_and_another_layer_continue_nothing(house: House, app: str, layer: int) -> None:
    house.keep("s1")
    assert house.taken(app=app, layer=layer) == ""


def test_a_worker_that_restarted_has_no_session(house: House) -> None:
    house.keep("s1")
    house.announce("w1", epoch=2)
    wait_until(lambda: len(house.kept) == 0, "it is forgotten")
    assert house.closed.empty()


def test_a_worker_that_is_stopping_is_not_asked(house: House) -> None:
    house.keep("s1")
    house.announce("w1", draining=True)
    assert house.taken() == ""


def test_of_too_many_sessions_the_app_with_the_most_gives_up_its_oldest(house: House) -> None:
    house.keep("quiet", app="quiet")
    for number in range(MAX_KEPT_SESSIONS):
        house.keep(f"loud-{number}", app="loud")
    assert house.closed.get(timeout=5) == ("w1", "loud-0")
    assert house.kept.is_kept("quiet", "w1")
    assert len(house.kept) == MAX_KEPT_SESSIONS


def test_after_another_split_no_session_is_left_and_that_of_a_running_answer_ends_too(
    house: House,
) -> None:
    house.keep("s1")
    house.kept.move(3)
    house.keep("s2")  # its answer began before
    assert {house.closed.get(timeout=5), house.closed.get(timeout=5)} == {
        ("w1", "s1"),
        ("w1", "s2"),
    }
    house.keep("s3", layer=3)
    assert house.taken(layer=3) == "s3"


def test_at_the_end_every_session_is_closed(house: House) -> None:
    house.keep("s1")
    house.keep("s2", app="another")
    house.kept.close()
    assert {house.closed.get(timeout=5), house.closed.get(timeout=5)} == {
        ("w1", "s1"),
        ("w1", "s2"),
    }
    assert house.taken() == ""
