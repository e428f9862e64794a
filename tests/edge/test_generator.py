"""Exit decisions of a device that is alone."""

from __future__ import annotations

import pytest

from edge_agent.generator import GeneratedToken, Generator
from edge_agent.partition import Partition
from fleet.manifest import Bundle
from fleet.messages import Sampling

PROMPT = [5, 9, 300, 17, 42]


@pytest.fixture(scope="module")
def partition(tiny_bundle: Bundle) -> Partition:
    return Partition(tiny_bundle, num_threads=1)


def generate(
    partition: Partition, thresholds: tuple[float, ...], sampling: Sampling | None = None, *, ask_cloud: bool = False
) -> tuple[list[GeneratedToken], Generator]:
    generator = Generator(partition, 64, thresholds, sampling or Sampling(), ask_cloud=ask_cloud)
    return list(generator.generate(PROMPT, 12)), generator


def test_threshold_zero_emits_at_the_first_exit_and_runs_nothing_deeper(partition: Partition) -> None:
    tokens, generator = generate(partition, (0.0, 0.0))
    assert {token.source for token in tokens} == {"exit:1"}
    assert generator.cascade.num_filled(1) == 0


def test_threshold_one_switches_an_exit_off(partition: Partition) -> None:
    tokens, _ = generate(partition, (1.0, 0.0))
    assert {token.source for token in tokens} == {"exit:2"}


def test_alone_the_deepest_exit_always_emits(partition: Partition) -> None:
    tokens, _ = generate(partition, (1.0, 1.0))
    assert {token.source for token in tokens} == {"exit:2"}


def test_without_the_cloud_that_was_wanted_it_is_a_fallback(partition: Partition) -> None:
    tokens, _ = generate(partition, (1.0, 1.0), ask_cloud=True)
    assert {token.source for token in tokens} == {"fallback"}


def test_a_seed_gives_the_same_answer_again_and_another_seed_another(partition: Partition) -> None:
    hot = [
        [t.token_id for t in generate(partition, (0.0, 0.0), Sampling(temperature=1.5, seed=seed))[0]]
        for seed in (1, 1, 2)
    ]
    assert hot[0] == hot[1] != hot[2]


def test_the_backlog_is_run_before_a_deeper_exit_speaks(partition: Partition) -> None:
    first = Generator(partition, 64, (0.0, 0.0), Sampling())
    tokens = list(first.generate(PROMPT, 6))
    assert first.cascade.num_filled(1) == 0
    first.cascade.run(1)
    assert first.cascade.num_filled(1) == first.cascade.num_filled(0) == len(PROMPT) + len(tokens) - 1
