"""Faults in the middle of a conversation: between two turns, and in a turn that continues one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import pytest

from cloud_broker_worker.worker.config import WorkerConfig
from cloud_broker_worker.worker.engine import EngineResponse
from cloud_broker_worker.worker.worker import Worker
from edge_agent.config import AgentConfig
from fleet.bundles.manifest import Bundle
from fleet.errors import FleetError
from fleet.protocol.modes import CLOUD, FALLBACK, Mode
from fleet.protocol.prompt import PromptRequest
from fleet.transport.in_memory import InMemoryTransport
from tests.brokers import wait_until
from tests.system.judge import first_turn, judge, next_turn
from tests.system.memory_fleet import (
    DEVICE,
    WAIT_S,
    WORKER,
    Answer,
    MemoryFleet,
    memory_fleet,
)

SECOND = "worker-2"
HASTY = AgentConfig(num_threads=1, assist_deadline_ms=500)
QUESTIONS = ("How warm is it?", "And now?", "Tell me about rivers.")
NUM_TOKENS = 24  # of the turn with the fault


class Site:
    """A conversation of an app with a device and a worker, whose other parts a test may start."""

    def __init__(
        self, fleet: MemoryFleet, bundle: Bundle, config: WorkerConfig, mode: Mode
    ) -> None:
        self.fleet = fleet
        self.bundle = bundle
        self.workers: list[Worker] = []
        self.links: list[InMemoryTransport] = []
        self._config = config
        self.start_worker()
        self.agent, self.device_link = fleet.start_device(bundle, HASTY)
        self.asked = first_turn(QUESTIONS[0], mode)
        self.answer = fleet.ask(self.asked)
        judge(bundle, self.asked, self.answer)

    def start_worker(self, name: str = WORKER) -> None:
        worker, link = self.fleet.start_worker(self.bundle, self._config, name)
        self.workers.append(worker)
        self.links.append(link)

    def start_device(self) -> None:
        """Start the device again, without what it had in memory."""
        self.agent.close()
        self.device_link.close()
        self.agent, self.device_link = self.fleet.start_device(self.bundle, HASTY)

    def turn(self, question: str, num_tokens: int = 12) -> PromptRequest:
        """Return the request of the next turn."""
        return next_turn(self.asked, self.answer, question, num_tokens)

    def ask(self, asked: PromptRequest, fault: Callable[[], None] = lambda: None) -> Answer:
        """Ask the next turn, with a fault after its fifth token."""
        self.answer = self.fleet.ask(asked, fault=fault)
        self.asked = asked
        judge(self.bundle, asked, self.answer)
        return self.answer

    @property
    def num_continued(self) -> int:
        return sum(worker.engine.counters.num_continued for worker in self.workers)

    def go_on(self) -> None:
        """Ask one more turn, which must continue the session of the last one."""
        before = self.num_continued
        assert self.ask(self.turn("Why?")).sources.keys() <= {CLOUD, "exit:1", "exit:2"}
        assert self.num_continued == before + 1


@contextmanager
def conversation(
    bundle: Bundle, mode: Mode = Mode.VERIFIED, config: WorkerConfig | None = None
) -> Iterator[Site]:
    """Yield a conversation after its first turn; check the workers at the end."""
    with memory_fleet() as fleet:
        site = Site(fleet, bundle, config or WorkerConfig(num_threads=1), mode)
        yield site
        for worker in site.workers:
            worker.__exit__(None, None, None)
            worker.engine.check_integrity()


# The faults.


def kill_the_worker(site: Site) -> None:
    site.links[-1].drop()
    site.workers[-1].__exit__(None, None, None)


def restart_the_worker(site: Site) -> None:
    kill_the_worker(site)
    site.start_worker()


def replace_the_worker(site: Site) -> None:
    site.start_worker(SECOND)
    site.links[0].drop()


def drain_the_worker(site: Site) -> None:
    site.start_worker(SECOND)
    site.workers[0].drain(threading.Event())


def cut_the_workers_link(site: Site) -> None:
    site.links[-1].drop()
    site.links[-1].restore()


def cut_the_devices_link(site: Site) -> None:
    site.device_link.drop()
    site.device_link.restore()


def forget_the_session(site: Site) -> None:
    engine = site.workers[-1].engine
    for session in list(engine.sessions.values()):
        engine.session_store.drop(session)


FAULTS = (
    restart_the_worker,
    replace_the_worker,
    drain_the_worker,
    cut_the_workers_link,
    cut_the_devices_link,
    forget_the_session,
)


@pytest.mark.parametrize("fault", [*FAULTS, Site.start_device])
def test_a_fault_between_two_turns_changes_no_token(
    tiny_bundle: Bundle, fault: Callable[[Site], None]
) -> None:
    with conversation(tiny_bundle) as site:
        fault(site)
        site.ask(site.turn(QUESTIONS[1]))
        site.go_on()


@pytest.mark.parametrize("mode", [Mode.VERIFIED, Mode.COLLABORATIVE])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_turn_that_continues_a_session_changes_no_token(
    tiny_bundle: Bundle, fault: Callable[[Site], None], mode: Mode
) -> None:
    with conversation(tiny_bundle, mode) as site:
        answer = site.ask(site.turn(QUESTIONS[1], NUM_TOKENS), lambda: fault(site))
        assert site.num_continued >= 1
        assert CLOUD in answer.sources
        site.ask(site.turn(QUESTIONS[2]))
        site.go_on()


def test_a_worker_that_is_gone_for_good_ends_a_turn_as_it_ends_a_first_one(
    tiny_bundle: Bundle,
) -> None:
    with conversation(tiny_bundle, Mode.COLLABORATIVE) as site:
        answer = site.ask(site.turn(QUESTIONS[1], NUM_TOKENS), lambda: kill_the_worker(site))
        assert answer.sources[FALLBACK] > 0
        verified = msgspec.structs.replace(
            site.turn(QUESTIONS[2]), mode=Mode.VERIFIED, deadline_ms=300
        )
        with pytest.raises(FleetError, match="deadline"):
            site.fleet.ask(verified)
        site.start_worker()
        site.ask(site.turn(QUESTIONS[2]))
        site.go_on()


def test_a_worker_that_stands_still_and_goes_on_again_disturbs_no_turn(
    tiny_bundle: Bundle,
) -> None:
    with conversation(tiny_bundle) as site:
        site.start_worker(SECOND)
        resume = threading.Event()
        engine = site.workers[0].engine
        step = engine.step

        def step_later() -> list[EngineResponse] | None:
            resume.wait(WAIT_S)
            return step()

        def stop() -> None:
            engine.step = step_later  # type: ignore[method-assign]

        site.ask(site.turn(QUESTIONS[1], NUM_TOKENS), stop)
        assert site.answer.last.note is not None
        resume.set()
        site.ask(site.turn(QUESTIONS[2]))
        site.go_on()
        wait_until(lambda: not engine.num_in_use, "the first worker let go", WAIT_S)


@pytest.mark.parametrize("end", ["cancelled", "deadline", "restarted"])
def test_a_turn_that_did_not_end_in_order_is_continued_by_none(
    tiny_bundle: Bundle, end: str
) -> None:
    with conversation(tiny_bundle) as site:
        asked = site.turn(QUESTIONS[1], 200)
        if end == "deadline":
            with pytest.raises(FleetError, match="deadline"):
                site.fleet.ask(msgspec.structs.replace(asked, deadline_ms=30))
        else:
            replies = site.fleet.client.ask(DEVICE, asked, timeout_s=WAIT_S)
            while next(replies).seq < 4:
                pass
            if end == "restarted":
                site.start_device()
            replies.close()
        site.ask(msgspec.structs.replace(asked, max_new_tokens=NUM_TOKENS))
        site.go_on()


def test_a_session_that_expires_between_two_turns_is_opened_afresh(tiny_bundle: Bundle) -> None:
    config = WorkerConfig(num_threads=1, session_ttl_s=0.5)
    with conversation(tiny_bundle, config=config) as site:
        for question in QUESTIONS[1:]:
            wait_until(lambda: not site.workers[0].engine.sessions, "it has expired", WAIT_S)
            site.ask(site.turn(question))
        assert site.num_continued == 0


def test_an_edited_history_and_a_shorter_one_get_their_own_answers(tiny_bundle: Bundle) -> None:
    with conversation(tiny_bundle) as site:
        first = site.asked
        before = site.answer
        site.ask(site.turn(QUESTIONS[1]))
        site.ask(next_turn(first, before, "And yesterday?"))
        site.ask(first)
        site.ask(first_turn("How cold is it?"))
        site.go_on()


def test_two_turns_that_continue_one_answer_at_once_are_both_right(tiny_bundle: Bundle) -> None:
    with conversation(tiny_bundle) as site:
        asked = [site.turn(question, NUM_TOKENS) for question in QUESTIONS[1:]]
        answers: dict[int, Answer] = {}

        def ask(number: int) -> None:
            answers[number] = site.fleet.ask(asked[number])

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        for number in range(2):
            judge(tiny_bundle, asked[number], answers[number])
        assert site.num_continued == 1
        site.go_on()
