"""Verified mode: the text is the whole model's, token for token, under every fault."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest

from benchmarks.whole_model import WholeModel
from cloud_broker_worker.worker.config import WorkerConfig
from edge_agent.config import AgentConfig
from fleet.bundles.manifest import Bundle
from fleet.errors import PromptError
from fleet.protocol import topics
from fleet.protocol.codec import encode
from fleet.protocol.messages import Close, Sampling
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import PromptRequest
from tests.conftest import MakeTinyBundle
from tests.system.memory_fleet import DEVICE, WAIT_S, WORKER, Answer, MemoryFleet, memory_fleet

PROMPTS = ("How warm is it?", "Say something about rivers.", "0123456789 " * 8)
LAYOUTS = [((1,), 1), ((3,), 3), ((1, 2), 2), ((1, 3), 1), ((2, 3), 3), ((1, 2, 3), 2)]
NUM_TOKENS = 24


def verified(prompt: str, threshold: float = 0.05, **changes: object) -> PromptRequest:
    request = PromptRequest(
        prompt=prompt, mode=Mode.VERIFIED, threshold=threshold, max_new_tokens=NUM_TOKENS
    )
    return msgspec.structs.replace(request, **changes)


@pytest.mark.parametrize("threshold", [0.0, 0.05, 1.0])
@pytest.mark.parametrize(("exits", "upload_layer"), LAYOUTS)
def test_the_text_is_the_whole_models(
    make_tiny_bundle: MakeTinyBundle, exits: tuple[int, ...], upload_layer: int, threshold: float
) -> None:
    bundle = make_tiny_bundle(exits, upload_layer=upload_layer)
    whole = WholeModel(bundle, num_threads=1)
    with memory_fleet() as fleet:
        worker, _ = fleet.start_worker(bundle)
        fleet.start_device(bundle)
        for prompt in PROMPTS:
            answer = fleet.ask(verified(prompt, threshold))
            assert answer.token_ids == whole.generate(prompt, NUM_TOKENS)
            assert "fallback" not in answer.sources
        worker.engine.pool.check_integrity()


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_a_sampled_text_is_the_whole_models_for_that_seed(
    tiny_bundle: Bundle, temperature: float
) -> None:
    whole = WholeModel(tiny_bundle, num_threads=1)
    with memory_fleet() as fleet:
        fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle)
        for seed in range(4):
            answer = fleet.ask(verified(PROMPTS[0], temperature=temperature, top_p=0.9, seed=seed))
            sampling = Sampling(temperature, 0.9, 0, seed)
            assert answer.token_ids == whole.generate(PROMPTS[0], NUM_TOKENS, sampling)


def test_no_token_costs_more_than_a_round_trip_and_everything_is_counted(
    tiny_bundle: Bundle,
) -> None:
    with memory_fleet() as fleet:
        fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle)
        answer = fleet.ask(verified("ab " * 40, max_new_tokens=64))
        report = fleet.reports.get(timeout=WAIT_S)
    usage = answer.last.usage
    assert usage is not None
    assert usage.round_trips <= usage.tokens == sum(usage.sources.values()) == 64
    assert usage.drafted >= usage.tokens - answer.sources["cloud"]
    assert (report.assists, report.verifies, report.drafted) == (
        0,
        usage.round_trips,
        usage.drafted,
    )


def interrupted(fleet: MemoryFleet, prompt: PromptRequest, at: int, fault: object) -> Answer:
    """An answer during which `fault()` happens after its reply number `at`."""
    answer = Answer()
    for reply in fleet.client.ask(DEVICE, prompt, timeout_s=WAIT_S):
        answer.replies.append(reply)
        if reply.seq == at:
            fault()  # type: ignore[operator]
    return answer


def test_another_worker_takes_over_and_not_a_token_differs(tiny_bundle: Bundle) -> None:
    expected = WholeModel(tiny_bundle, num_threads=1).generate(PROMPTS[1], NUM_TOKENS)
    with memory_fleet() as fleet:
        _, first = fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle)

        def replace_worker() -> None:
            first.drop()
            fleet.start_worker(tiny_bundle, name="worker-2")

        answer = interrupted(fleet, verified(PROMPTS[1]), 5, replace_worker)
    assert answer.token_ids == expected


def test_a_link_that_was_cut_delays_the_text_and_changes_nothing(tiny_bundle: Bundle) -> None:
    expected = WholeModel(tiny_bundle, num_threads=1).generate(PROMPTS[1], NUM_TOKENS)
    with memory_fleet() as fleet:
        fleet.start_worker(tiny_bundle)
        _, link = fleet.start_device(tiny_bundle)

        def blink() -> None:
            link.drop()
            link.restore()

        answer = interrupted(fleet, verified(PROMPTS[1]), 5, blink)
    assert answer.token_ids == expected
    assert [b.seq - a.seq for a, b in pairwise(answer.replies)] == [1] * (len(answer.replies) - 1)


def test_a_worker_that_forgot_the_session_gets_it_again(tiny_bundle: Bundle) -> None:
    expected = WholeModel(tiny_bundle, num_threads=1).generate(PROMPTS[1], NUM_TOKENS)
    with memory_fleet() as fleet:
        worker, _ = fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle)

        def forget() -> None:
            (key,) = worker.engine.sessions
            fleet.watcher.publish(topics.to_worker(WORKER, *key), encode(Close(key.session)))

        answer = interrupted(fleet, verified(PROMPTS[1]), 5, forget)
    assert answer.token_ids == expected
    assert answer.last.note is not None
    assert "unknown_session" in answer.last.note


def test_without_the_cloud_it_ends_at_its_deadline_with_an_error(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        fleet.start_device(tiny_bundle)
        with pytest.raises(
            PromptError, match=r"deadline passed after 0 tokens .*no cloud worker is online"
        ):
            fleet.ask(verified(PROMPTS[0], deadline_ms=300))


def test_a_worker_that_can_never_take_it_ends_it_at_once(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        fleet.start_worker(tiny_bundle, WorkerConfig(num_threads=1, kv_budget_bytes=1000))
        fleet.start_device(tiny_bundle, AgentConfig(num_threads=1))
        with pytest.raises(PromptError, match="no_cloud"):
            fleet.ask(verified(PROMPTS[0]))


def test_a_cancelled_one_ends_while_it_waits(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        fleet.start_device(tiny_bundle, AgentConfig(num_threads=1, max_concurrent_requests=1))
        stream = fleet.client.ask(DEVICE, verified(PROMPTS[0]), timeout_s=0.2)
        with pytest.raises(Exception, match="did not respond"):
            next(stream)
        cancelled = fleet.reports.get(timeout=WAIT_S)
        assert (cancelled.finish_reason, cancelled.tokens) == ("cancelled", 0)
        fleet.start_worker(tiny_bundle)
        assert fleet.ask(verified(PROMPTS[0])).last.finish_reason in ("stop", "length")
