"""Blocks run in any legal order leave the same state."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from fleet.graphs.cascade import LARGE_CHUNK, MAX_CHUNK, Cascade
from fleet.graphs.partition import Partition
from tests.conftest import MakeTinyBundle

TOKENS = [5, 9, 300, 17, 42, 42, 8, 250, 3, 77]


@pytest.fixture(scope="module", params=["linear", "block"])
def partition(request: pytest.FixtureRequest, make_tiny_bundle: MakeTinyBundle) -> Partition:
    return Partition(make_tiny_bundle(kind=request.param), num_threads=1)


def run_all(partition: Partition, chunks: list[list[int]]) -> Cascade:
    cascade = Cascade(partition, 32)
    for chunk in chunks:
        cascade.append(chunk)
        for block in range(len(partition.blocks)):
            cascade.run(block)
    return cascade


def assert_same_state(one: Cascade, other: Cascade, num_blocks: int) -> None:
    for block in range(num_blocks):
        assert one.num_filled(block) == other.num_filled(block) == len(TOKENS)
        np.testing.assert_allclose(
            one.hidden_states(block, 0), other.hidden_states(block, 0), rtol=1e-4, atol=1e-5
        )
        for a, b in zip(one.caches(block), other.caches(block), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_one_chunk_and_single_steps_leave_the_same_caches(partition: Partition) -> None:
    stepwise = run_all(partition, [[token] for token in TOKENS])
    assert_same_state(run_all(partition, [TOKENS]), stepwise, len(partition.blocks))


def test_a_backlog_filled_later_leaves_the_same_caches_as_running_every_layer(
    partition: Partition,
) -> None:
    late = Cascade(partition, 32)
    late.append(TOKENS[:4])
    late.run(0)
    for token in TOKENS[4:-1]:
        late.append([token])
        late.run(0)
    assert late.num_filled(1) == 0
    late.append(TOKENS[-1:])
    late.run(0)
    late.run(1)
    assert_same_state(
        late, run_all(partition, [[token] for token in TOKENS]), len(partition.blocks)
    )


def test_a_prompt_of_several_chunks_leaves_what_single_steps_leave(partition: Partition) -> None:
    prompt = [TOKENS[i % len(TOKENS)] + i // len(TOKENS) for i in range(MAX_CHUNK + 7)]
    whole = Cascade(partition, len(prompt))
    stepwise = Cascade(partition, len(prompt))
    turns: list[int] = []

    class Turn(nullcontext[None]):
        def __enter__(self) -> None:
            turns.append(whole.num_filled(0))

    whole.append(prompt)
    expected = whole.run(0, Turn)
    for token in prompt:
        stepwise.append([token])
        candidates = stepwise.run(0)
    assert turns == [0, MAX_CHUNK]
    np.testing.assert_allclose(
        whole.hidden_states(0, 0), stepwise.hidden_states(0, 0), rtol=1e-3, atol=1e-4
    )
    assert candidates.confidence == pytest.approx(expected.confidence, rel=1e-3)


def test_what_was_cut_off_leaves_nothing_behind(partition: Partition) -> None:
    cut = Cascade(partition, 32)
    straight = run_all(partition, [TOKENS])
    cut.append([*TOKENS[:4], 1, 2, 3])
    for block in range(len(partition.blocks)):
        cut.run(block)
    cut.truncate(4)
    assert (cut.num_tokens, cut.num_filled(0), cut.num_filled(1)) == (4, 4, 4)
    cut.append(TOKENS[4:])
    for block in range(len(partition.blocks)):
        cut.run(block)
    assert_same_state(cut, straight, len(partition.blocks))


def test_a_sequence_takes_the_memory_that_it_says(partition: Partition) -> None:
    cascade = run_all(partition, [TOKENS])
    caches = [cache for block in range(len(partition.blocks)) for cache in cascade.caches(block)]
    rows = [cascade.hidden_states(block, 0) for block in range(len(partition.blocks))]
    arrays = [array if array.base is None else array.base for array in (*caches, *rows)]
    buffers = {id(array): array for array in arrays}.values()
    allocated = sum(buffer.nbytes for buffer in buffers) + 8 * 32
    assert Cascade.num_bytes(partition, 32) == allocated


def test_the_exit_speaks_for_the_newest_position(partition: Partition) -> None:
    whole = Cascade(partition, 32)
    stepwise = Cascade(partition, 32)
    whole.append(TOKENS)
    expected = whole.run(0)
    for token in TOKENS:
        stepwise.append([token])
        candidates = stepwise.run(0)
    np.testing.assert_array_equal(candidates.token_ids[:5], expected.token_ids[:5])
    assert candidates.confidence == pytest.approx(expected.confidence, rel=1e-3)


def test_candidates_are_log_probabilities_best_first(partition: Partition) -> None:
    cascade = Cascade(partition, 32)
    cascade.append(TOKENS)
    candidates = cascade.run(0)
    assert (np.diff(candidates.logprobs) <= 0).all()
    assert candidates.confidence == pytest.approx(float(np.exp(candidates.logprobs[0])), rel=1e-5)
    assert float(np.exp(candidates.logprobs).sum()) <= 1 + 1e-5


def test_a_run_over_a_long_prompt_returns_its_memory_and_a_step_does_not_wait_for_that(
    partition: Partition, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ort.InferenceSession.run_with_iobinding
    shrinks: list[bool] = []

    def record(session: ort.InferenceSession, binding: ort.IOBinding, options: Any = None) -> None:
        key = "memory.enable_memory_arena_shrinkage"
        shrinks.append(options is not None and options.get_run_config_entry(key) == "cpu:0")
        run(session, binding, options)

    cascade = Cascade(partition, LARGE_CHUNK + 20)
    monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", record)
    for count in (LARGE_CHUNK, LARGE_CHUNK // 8, 1):
        cascade.append([7] * count)
        cascade.fill(0)
    assert shrinks == [True, False, False]
