"""Messages lost, doubled, reordered, late or forged: the text is right, others unaffected."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Final

import msgpack
import msgspec
import numpy as np
import pytest

from cloud_broker_worker.worker.config import WorkerConfig
from cloud_broker_worker.worker.upper_layers import UpperLayers
from cloud_broker_worker.worker.worker import Worker
from edge_agent.config import AgentConfig
from fleet.bundles.manifest import Bundle
from fleet.errors import PromptError
from fleet.protocol import topics
from fleet.protocol.codec import decode_to_worker, encode, pack_chunk
from fleet.protocol.messages import (
    PROTOCOL,
    Close,
    Context,
    ContextChunk,
    Continuation,
    Open,
    Sampling,
    ToWorker,
    Verify,
)
from fleet.protocol.modes import CLOUD, Mode
from fleet.protocol.prompt import PromptRequest
from fleet.transport.base import Will
from fleet.transport.in_memory import InMemoryTransport
from tests.brokers import wait_until
from tests.conftest import MakeTinyBundle
from tests.hostile import PERFECT, HostileLink, Odds, Said
from tests.recorded import chunks_of
from tests.system.judge import first_turn, judge, next_turn, request
from tests.system.memory_fleet import DEVICE, WAIT_S, WORKER, Answer, MemoryFleet, memory_fleet

NEIGHBOUR: Final = "edge-2"
PROMPTS: Final = ("How warm is it?", "Say something about rivers.", "0123456789 " * 8)
HASTY: Final = AgentConfig(
    num_threads=1, assist_deadline_ms=300
)  # what is lost is asked for again after 100 ms
PATIENT: Final = AgentConfig(num_threads=1, assist_deadline_ms=20_000)
SEEDS: Final = range(6)
MODES: Final = (Mode.VERIFIED, Mode.COLLABORATIVE)
MOST_TRIES: Final = 40
NUM_BEFORE: Final = 16  # messages of a device in a session before something is forged
FORGERIES: Final = (
    "an earlier epoch",
    "another bundle",
    "not finite",
    "infinite",
    "too wide",
    "another count",
    "another dtype",
    "wrong checksum",
    "positions that skip",
    "a branch to come",
    "a continuation of itself",
    "a continuation by another",
    "questions out of turn",
    "questions with wrong context",
)


class HostileFleet(MemoryFleet):
    """A worker, a device `DEVICE` with a hostile link, and a neighbour that shall not notice."""

    def __init__(self, seed: int, odds: Odds) -> None:
        self._seed = seed
        self._odds = odds
        super().__init__()

    def connect(self, name: str, will: Will | None = None) -> InMemoryTransport:
        if name != DEVICE:
            return super().connect(name, will)
        self.link = self._stack.enter_context(
            HostileLink(self.broker, name, will, self._seed, self._odds)
        )
        self.link.start()
        return self.link


@contextmanager
def hostile_fleet(
    bundle: Bundle, seed: int = 0, odds: Odds = PERFECT, config: AgentConfig = PATIENT
) -> Iterator[tuple[HostileFleet, Worker]]:
    """Check that the block leaves the neighbour's answer and the worker's state unaffected."""
    with HostileFleet(seed, odds) as fleet, ThreadPoolExecutor(1) as pool:
        worker, _ = fleet.start_worker(bundle)
        fleet.start_device(bundle, config)
        fleet.start_device(bundle, PATIENT, name=NEIGHBOUR)
        asked = request(PROMPTS[1], num_tokens=96)
        beside = pool.submit(fleet.ask, asked, NEIGHBOUR)
        yield fleet, worker
        answer = beside.result(WAIT_S)
        judge(bundle, asked, answer)
        assert answer.last.note is None
        worker.__exit__(None, None, None)
        worker.engine.check_integrity()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", SEEDS)
def test_messages_lost_doubled_reordered_and_replayed_change_no_token(
    tiny_bundle: Bundle, seed: int, mode: Mode
) -> None:
    odds = Odds(lost=0.05, doubled=0.1, held=0.1, replayed=0.1)
    with hostile_fleet(tiny_bundle, seed, odds, HASTY) as (fleet, _):
        asked = first_turn(PROMPTS[0], mode)
        answer = ask_until_the_cloud_answers(fleet, tiny_bundle, asked)
        asked = next_turn(asked, answer, PROMPTS[1], num_tokens=24)
        ask_until_the_cloud_answers(fleet, tiny_bundle, asked)
    assert fleet.link.up.num_done > 0
    assert fleet.link.down.num_done > 0


def ask_until_the_cloud_answers(fleet: MemoryFleet, bundle: Bundle, asked: PromptRequest) -> Answer:
    """Ask again and again: a first question may be lost until the answer has gone on without the
    cloud.
    """
    for _ in range(MOST_TRIES):
        answer = fleet.ask(asked)
        judge(bundle, asked, answer)
        if CLOUD in answer.sources:
            return answer
    raise AssertionError(f"no answer in {MOST_TRIES} had a token of the cloud")


def await_end(fleet: HostileFleet, worker: Worker) -> None:
    """Stop the device, and wait until the worker has none of its sessions."""
    fleet.agents[DEVICE].close()
    sessions = worker.engine.sessions
    wait_until(
        lambda: all(key.device != DEVICE for key in list(sessions)),
        "the worker has no session of the device",
        WAIT_S,
    )


def ask_while_forging(
    fleet: HostileFleet,
    bundle: Bundle,
    mode: Mode,
    make: Callable[[Sequence[Said]], Iterable[Said]],
) -> Answer:
    """A right answer, in the midst of which the device says what ``make(said)`` gives as well.

    In verified mode it is the second turn of a conversation, whose session continues another one.
    """
    asked = request(PROMPTS[0], mode, num_tokens=48)
    if mode is Mode.VERIFIED:
        first = first_turn(PROMPTS[0])
        asked = next_turn(first, fleet.ask(first), PROMPTS[1], num_tokens=48)
    fleet.link.forge(NUM_BEFORE, make)
    answer = fleet.ask(asked)
    judge(bundle, asked, answer)
    assert fleet.link.has_forged
    assert CLOUD in answer.sources
    return answer


@pytest.mark.parametrize("mode", MODES)
def test_a_replayed_closed_session_disturbs_no_other_and_leaves_nothing(
    tiny_bundle: Bundle, mode: Mode
) -> None:
    with hostile_fleet(tiny_bundle) as (fleet, worker):
        asked = request(PROMPTS[2], mode)
        judge(tiny_bundle, asked, fleet.ask(asked))
        old = [said for said in fleet.link.said if not isinstance(decode_to_worker(said[1]), Close)]
        assert len(old) > NUM_BEFORE
        ask_while_forging(fleet, tiny_bundle, mode, lambda _: old)
        await_end(fleet, worker)


def forgeries(said: Sequence[Said], bundle: Bundle) -> dict[str, list[ToWorker]]:
    """Messages of a faulty device in its own session, by kind."""
    messages = [decode_to_worker(payload) for _, payload in said]
    opening = next(message for message in messages if isinstance(message, Open))
    chunk = chunks_of(messages)[-1]
    session = opening.session
    branch = chunk.branch
    hidden_size = bundle.manifest.model.hidden_size
    rows = np.ones((1, hidden_size), np.float16)
    wide = np.ones((1, hidden_size + 1), np.float16)
    not_finite = [pack_chunk(branch, start, rows * np.float16("nan")) for start in range(82)]
    changed = msgspec.structs.replace

    question = Verify(session=session, request=0, branch=branch, start=0, draft=(1,), deadline_ms=1)

    continues = Continuation(session=session, branch=branch, num_positions=1 << 20)

    def sent(*chunks: ContextChunk) -> list[ToWorker]:
        return [Context(session, chunk) for chunk in chunks]

    return {
        "an earlier epoch": [
            changed(opening, epoch=opening.epoch - 1, max_positions=1, branch=branch)
        ],
        "another bundle": [
            changed(opening, bundle_id="other", branch=branch + 1),
            changed(opening, protocol=1),
        ],
        "not finite": sent(*not_finite),
        "infinite": sent(
            *(pack_chunk(branch, start, rows * np.float16("inf")) for start in range(82))
        ),
        "too wide": sent(*(pack_chunk(branch, start, wide) for start in range(82))),
        "another count": sent(changed(chunk, count=chunk.count + 1), changed(chunk, count=1 << 20)),
        "another dtype": sent(changed(chunk, dtype="float64"), changed(chunk, dtype="x" * 4000)),
        "wrong checksum": sent(
            *(changed(chunk, start=start, crc32=chunk.crc32 ^ 1) for start in range(82))
        ),
        "positions that skip": sent(
            *(pack_chunk(branch, start, rows) for start in (75, 1000, (1 << 20) - 1))
        ),
        "a branch to come": sent(pack_chunk(branch + 50, 0, rows)),
        "a continuation of itself": [
            changed(opening, max_positions=opening.max_positions + 1, continues=continues)
        ],
        "a continuation by another": [changed(opening, session="thief", continues=continues)],
        "questions out of turn": [
            question,
            changed(question, draft=(1, 2, 3)),
            Verify(
                session=session,
                request=1,
                branch=branch,
                start=5,
                draft=tuple(range(64)),
                deadline_ms=600_000,
            ),
            changed(question, request=1 << 60),
            changed(question, request=1 << 60, start=(1 << 20) - 1),
        ],
        "questions with wrong context": [
            changed(question, chunk=pack_chunk(branch, 0, wide)),
            changed(question, chunk=changed(chunk, start=chunk.start + chunk.count + 1)),
            *(changed(question, chunk=nan) for nan in not_finite),
            changed(question, chunk=changed(chunk, crc32=chunk.crc32 ^ 1)),
        ],
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", FORGERIES)
def test_wrong_messages_in_the_midst_of_a_session_harm_no_answer(
    tiny_bundle: Bundle, kind: str, mode: Mode
) -> None:
    def forge(said: Sequence[Said]) -> Iterable[Said]:
        in_session = said[-1][0]
        for message in forgeries(said, tiny_bundle)[kind]:
            is_opening = isinstance(message, Open)
            yield topics.open_session(DEVICE) if is_opening else in_session, encode(message)

    with hostile_fleet(tiny_bundle) as (fleet, _):
        ask_while_forging(fleet, tiny_bundle, mode, forge)


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\x90"


def garbage(said: Sequence[Said]) -> list[bytes]:
    """Bytes that are no messages: truncated, with a flipped bit, or made to attack a decoder."""
    cut = [payload[: len(payload) * part // 7] for _, payload in said[:8] for part in range(1, 7)]
    random = np.random.default_rng(0)
    flipped = []
    for _, payload in said[:8]:
        altered = bytearray(payload)
        altered[random.integers(min(40, len(altered)))] ^= 1 << random.integers(8)
        flipped.append(bytes(altered))
    bombs = [
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        nested(100),
        nested(100_000),
    ]
    oversized = msgpack.packb({"type": "context", "data": b"x" * 300_000})
    return [b"", b"\xc1", b"\x00" * 10, *cut, *flipped, *bombs, oversized, b"x" * 1_000_000]


@pytest.mark.parametrize("mode", MODES)
def test_garbage_in_the_midst_of_a_session_harms_no_answer(tiny_bundle: Bundle, mode: Mode) -> None:
    def litter(said: Sequence[Said]) -> Iterable[Said]:
        opened = topics.open_session(DEVICE)
        in_session = said[-1][0]
        for payload in garbage(said):
            for topic in (
                opened,
                in_session,
                topics.to_device(DEVICE, in_session.rsplit("/", 1)[1]),
            ):
                yield topic, payload

    with hostile_fleet(tiny_bundle) as (fleet, _):
        ask_while_forging(fleet, tiny_bundle, mode, litter)


@pytest.mark.parametrize("mode", MODES)
def test_two_workers_that_claim_a_session_give_one_answer_and_one_lets_go(
    tiny_bundle: Bundle, mode: Mode
) -> None:
    with hostile_fleet(tiny_bundle) as (fleet, worker):
        other, _ = fleet.start_worker(tiny_bundle, name="worker-2")
        claims = SimpleQueue[object]()
        fleet.watcher.subscribe(
            topics.to_device(DEVICE, "+"), lambda _, payload: claims.put(msgpack.unpackb(payload))
        )
        for prompt in PROMPTS:
            asked = request(prompt, mode)
            judge(tiny_bundle, asked, fleet.ask(asked))
        said = [
            claim
            for claim in (claims.get() for _ in range(claims.qsize()))
            if isinstance(claim, dict)
        ]
        assert {claim["worker"] for claim in said if claim["type"] == "opened"} == {
            WORKER,
            "worker-2",
        }
        await_end(fleet, worker)
        await_end(fleet, other)
        other.__exit__(None, None, None)
        other.engine.check_integrity()


def test_an_answer_waits_for_room_on_a_full_worker(tiny_bundle: Bundle) -> None:
    shape = UpperLayers(tiny_bundle, 1).new_pool(1).shape
    config = WorkerConfig(
        num_threads=1,
        kv_budget_bytes=100 * (shape.cache_bytes + shape.hidden_bytes),
        retry_after_ms=20,
    )
    with memory_fleet() as fleet:
        worker, _ = fleet.start_worker(tiny_bundle, config)
        fleet.start_device(tiny_bundle, HASTY)
        opening = Open(
            session="s1",
            epoch=1,
            bundle_id=tiny_bundle.manifest.bundle_id,
            protocol=PROTOCOL,
            sampling=Sampling(),
            max_positions=90,
            deadline_ms=1000,
        )
        fleet.watcher.publish(topics.open_session(NEIGHBOUR), encode(opening))
        rows = np.zeros((50, tiny_bundle.manifest.model.hidden_size), np.float16)
        context = Context("s1", pack_chunk(0, 0, rows))
        fleet.watcher.publish(topics.to_worker(WORKER, NEIGHBOUR, "s1"), encode(context))
        fleet.watcher.subscribe(
            topics.to_device(DEVICE, "+"), lambda _, payload: make_room(payload)
        )

        def make_room(payload: bytes) -> None:
            if msgpack.unpackb(payload)["type"] == "refused":
                fleet.watcher.publish(
                    topics.to_worker(WORKER, NEIGHBOUR, "s1"), encode(Close("s1"))
                )

        asked = request(PROMPTS[0], num_tokens=48)
        answer = fleet.ask(asked)
        judge(tiny_bundle, asked, answer)
        assert answer.last.note is not None
        assert "busy" in answer.last.note
        worker.__exit__(None, None, None)
        worker.engine.check_integrity()


def test_a_worker_with_another_bundle_is_left_alone_and_the_error_names_both(
    tiny_bundle: Bundle, make_tiny_bundle: MakeTinyBundle
) -> None:
    other = make_tiny_bundle((1, 3))
    with memory_fleet() as fleet:
        fleet.start_worker(tiny_bundle)
        fleet.start_device(other)
        fleet.start_device(tiny_bundle, name=NEIGHBOUR)
        with pytest.raises(PromptError, match="deadline passed") as error:
            fleet.ask(request(PROMPTS[0], deadline_ms=300))
        assert other.manifest.bundle_id in str(error.value)
        assert tiny_bundle.manifest.bundle_id in str(error.value)
        asked = request(PROMPTS[0])
        judge(tiny_bundle, asked, fleet.ask(asked, NEIGHBOUR))
