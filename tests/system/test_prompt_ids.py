"""Prompts as token ids: the text is that of hidden states, in every mode and under faults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from cloud_broker_worker.worker.config import WorkerConfig
from edge_agent.config import AgentConfig
from fleet.bundles.manifest import Bundle
from fleet.protocol.codec import decode_to_worker
from fleet.protocol.messages import Context, Verify
from fleet.protocol.modes import CLOUD, FALLBACK, Mode
from fleet.protocol.prompt import PromptRequest
from tests.system.judge import first_turn, judge, next_turn, request
from tests.system.memory_fleet import MemoryFleet, memory_fleet

WORKER_WITH_PROMPTS = WorkerConfig(num_threads=1, lower_layers=True)
WITH_IDS = AgentConfig(num_threads=1, upload_prompt="tokens")
HASTY = AgentConfig(num_threads=1, upload_prompt="tokens", assist_deadline_ms=500)
PROMPT = "The quick brown fox jumps over the lazy dog. " * 4
SECOND = "worker-2"


class Uploads:
    """The positions of chunks that a fleet's devices send, by dtype; it may lose some."""

    def __init__(self, fleet: MemoryFleet) -> None:
        self.positions = Counter[str]()
        fleet.watcher.subscribe("ce/v1/w/+/+/+", self._on_message)

    def _on_message(self, topic: str, payload: bytes) -> None:
        message = decode_to_worker(payload)
        chunk = message.chunk if isinstance(message, Context | Verify) else None
        if chunk:
            self.positions[chunk.dtype] += chunk.count


@pytest.mark.parametrize("mode", [Mode.VERIFIED, Mode.COLLABORATIVE, Mode.AUTO])
def test_the_text_is_that_of_hidden_states_for_fewer_bytes(tiny_bundle: Bundle, mode: Mode) -> None:
    asked = request(PROMPT, mode)
    with memory_fleet() as fleet:
        fleet.start_worker(tiny_bundle, WORKER_WITH_PROMPTS)
        uploads = Uploads(fleet)
        fleet.start_device(tiny_bundle)
        fleet.start_device(tiny_bundle, WITH_IDS, "edge-2")
        hidden = fleet.ask(asked)
        assert uploads.positions["tokens"] == 0
        ids = fleet.ask(asked, "edge-2")
    judge(tiny_bundle, asked, ids)
    assert ids.token_ids == hidden.token_ids
    assert ids.sources == hidden.sources
    assert FALLBACK not in ids.sources
    assert uploads.positions["tokens"] == ids.usage.prompt_tokens
    saved = hidden.usage.bytes_up - ids.usage.bytes_up
    assert saved > 100 * ids.usage.prompt_tokens


def test_a_worker_without_lower_layers_gets_hidden_states(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        fleet.start_worker(tiny_bundle)
        uploads = Uploads(fleet)
        fleet.start_device(tiny_bundle, WITH_IDS)
        asked = request(PROMPT)
        judge(tiny_bundle, asked, fleet.ask(asked))
    assert uploads.positions.keys() == {"float16"}


def forget_the_session(fleet: MemoryFleet, worker: object) -> None:
    engine = worker.engine  # type: ignore[attr-defined]
    for session in list(engine.sessions.values()):
        engine.session_store.drop(session)


def evict_the_caches(fleet: MemoryFleet, worker: object) -> None:
    engine = worker.engine  # type: ignore[attr-defined]
    for session in list(engine.sessions.values()):
        engine.session_store.evict(session)


def replace_the_worker(fleet: MemoryFleet, worker: object) -> None:
    fleet.start_worker(fleet.bundle, WORKER_WITH_PROMPTS, SECOND)  # type: ignore[attr-defined]
    fleet.link.drop()  # type: ignore[attr-defined]


def replace_it_by_one_without_lower_layers(fleet: MemoryFleet, worker: object) -> None:
    fleet.start_worker(fleet.bundle, None, SECOND)  # type: ignore[attr-defined]
    fleet.link.drop()  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", [Mode.VERIFIED, Mode.COLLABORATIVE])
@pytest.mark.parametrize(
    "fault",
    [
        forget_the_session,
        evict_the_caches,
        replace_the_worker,
        replace_it_by_one_without_lower_layers,
    ],
)
def test_a_fault_changes_no_token(
    tiny_bundle: Bundle, fault: Callable[[MemoryFleet, object], None], mode: Mode
) -> None:
    with memory_fleet() as fleet:
        worker, link = fleet.start_worker(tiny_bundle, WORKER_WITH_PROMPTS)
        fleet.bundle = tiny_bundle  # type: ignore[attr-defined]
        fleet.link = link  # type: ignore[attr-defined]
        fleet.start_device(tiny_bundle, HASTY)
        asked = request(PROMPT, mode)
        answer = fleet.ask(asked, fault=lambda: fault(fleet, worker))
        judge(tiny_bundle, asked, answer)
        assert CLOUD in answer.sources


def test_a_prompt_whose_ids_are_lost_is_sent_again(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        worker, _ = fleet.start_worker(tiny_bundle, WORKER_WITH_PROMPTS)
        uploads = Uploads(fleet)
        store = worker.engine._store
        num_lost = 2

        def lose(session: object, chunk: object, now: float) -> object:
            nonlocal num_lost
            if num_lost and chunk.dtype == "tokens":  # type: ignore[attr-defined]
                num_lost -= 1
                return None
            return store(session, chunk, now)  # type: ignore[arg-type]

        worker.engine._store = lose  # type: ignore[method-assign,assignment]
        fleet.start_device(tiny_bundle, HASTY)
        asked = request(PROMPT)
        answer = fleet.ask(asked)
        judge(tiny_bundle, asked, answer)
    assert num_lost == 0
    assert uploads.positions["tokens"] >= 3 * answer.usage.prompt_tokens


@pytest.mark.parametrize("mode", [Mode.VERIFIED, Mode.COLLABORATIVE])
def test_a_conversation_goes_on_from_a_prompt_that_came_as_ids(
    tiny_bundle: Bundle, mode: Mode
) -> None:
    with memory_fleet() as fleet:
        worker, _ = fleet.start_worker(tiny_bundle, WORKER_WITH_PROMPTS)
        fleet.start_device(tiny_bundle, WITH_IDS)
        asked: PromptRequest = first_turn("How warm is it?", mode)
        answer = fleet.ask(asked)
        judge(tiny_bundle, asked, answer)
        for number, question in enumerate(("And now?", "Why?")):
            asked = next_turn(asked, answer, question)
            answer = fleet.ask(asked)
            judge(tiny_bundle, asked, answer)
            assert worker.engine.counters.num_continued == number + 1
        worker.engine.check_integrity()
