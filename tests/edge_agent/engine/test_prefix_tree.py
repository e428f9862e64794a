"""Kept caches: what prompts share runs once, in bounded memory, and never across apps."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pytest

from edge_agent.engine.prefix_tree import KeptCaches
from fleet.bundles.manifest import Bundle
from fleet.graphs.cascade import Cascade
from fleet.graphs.partition import Partition

AMPLE: Final = 1 << 30
SYSTEM: Final = [5, 9, 300, 17]
FIRST: Final = [*SYSTEM, 42, 8, 250, 3, 77]
SECOND: Final = [*SYSTEM, 43, 11, 12]


@pytest.fixture(scope="module")
def partition(tiny_bundle: Bundle) -> Partition:
    return Partition(tiny_bundle, num_threads=1)


class Answers:
    """Sequences that run as answers do: their caches are looked up first, and kept at the end."""

    def __init__(self, partition: Partition, budget_bytes: int = AMPLE) -> None:
        self.budget_bytes = budget_bytes
        self.leased_bytes = 0
        self.kept = KeptCaches(lambda: self.budget_bytes - self.leased_bytes)
        self._partition = partition

    def num_reused(self, token_ids: Sequence[int], app: str = "app") -> int:
        return len(self.kept.find(app, [*token_ids, 0, 0]))

    def begun(self, token_ids: Sequence[int], app: str = "app") -> Cascade:
        cascade = Cascade(self._partition, capacity=40)
        prefix = self.kept.find(app, token_ids)
        cascade.load(prefix.token_ids.tolist(), prefix.blocks)
        cascade.append(token_ids[cascade.num_tokens :])
        return cascade

    def run(
        self, token_ids: Sequence[int], app: str = "app", num_deep: int | None = None
    ) -> Cascade:
        """Run a sequence; the second block runs only the first `num_deep` tokens."""
        cascade = self.begun(token_ids[:num_deep], app)
        for block in range(cascade.num_blocks):
            cascade.fill(block)
        cascade.append(token_ids[cascade.num_tokens :])
        cascade.fill(0)
        self.kept.keep(app, cascade, len(token_ids))
        return cascade

    @property
    def is_within_budget(self) -> bool:
        return self.kept.num_bytes <= self.budget_bytes - self.leased_bytes

    def bytes_of(self, *lengths: int) -> int:
        num_bytes = Cascade.num_bytes(self._partition, sum(lengths))
        return num_bytes - Cascade.num_bytes(self._partition, 0)


def test_a_prompt_begins_with_the_states_that_an_earlier_one_left(partition: Partition) -> None:
    answers = Answers(partition)
    earlier = answers.run(FIRST)
    later = answers.begun([*FIRST, 1, 2])
    assert later.num_tokens == len(FIRST) + 2
    for block in range(later.num_blocks):
        assert later.num_filled(block) == len(FIRST)
        kept = later.state(block, 0, len(FIRST))
        ran = earlier.state(block, 0, len(FIRST))
        np.testing.assert_array_equal(kept.hidden_states, ran.hidden_states)
        np.testing.assert_array_equal(kept.caches, ran.caches)


def test_the_last_two_positions_of_a_prompt_always_run(partition: Partition) -> None:
    answers = Answers(partition)
    answers.run(FIRST)
    assert len(answers.kept.find("app", FIRST)) == len(FIRST) - 2
    assert len(answers.kept.find("app", FIRST[:1])) == 0


@pytest.mark.parametrize("num_equal", range(len(FIRST)))
def test_an_edited_history_shares_what_comes_before_the_edit(
    partition: Partition, num_equal: int
) -> None:
    answers = Answers(partition)
    answers.run(FIRST)
    edited = [*FIRST[:num_equal], 99, 98, 97]
    assert answers.num_reused(edited) == num_equal
    answers.run(edited)
    assert answers.num_reused(edited) == len(edited)
    assert answers.num_reused(FIRST) == len(FIRST)
    assert answers.kept.num_bytes == answers.bytes_of(len(FIRST), len(edited) - num_equal)


def test_a_segment_that_is_split_twice_keeps_every_state(partition: Partition) -> None:
    answers = Answers(partition)
    whole = answers.run(FIRST)
    answers.run(SECOND)
    answers.run([*FIRST[:6], 1])
    for prompt in (FIRST, SECOND, [*FIRST[:6], 1]):
        fresh = Answers(partition).run(prompt)
        reused = answers.begun([*prompt, 0, 0])
        for block in range(fresh.num_blocks):
            assert reused.num_filled(block) == len(prompt)
            np.testing.assert_allclose(
                reused.hidden_states(block, 0), fresh.hidden_states(block, 0), atol=1e-5, rtol=1e-4
            )
    assert answers.kept.num_bytes == answers.bytes_of(len(FIRST), 3, 1)
    np.testing.assert_array_equal(
        answers.begun([*FIRST, 0, 0]).hidden_states(1, 0), whole.hidden_states(1, 0)
    )


def test_the_same_prompt_of_another_app_reuses_nothing(partition: Partition) -> None:
    answers = Answers(partition)
    answers.run(FIRST, "app")
    assert answers.num_reused(FIRST, "other") == 0
    answers.run(FIRST, "other")
    assert answers.kept.num_bytes == answers.bytes_of(2 * len(FIRST))


def test_a_block_that_early_exits_skipped_is_completed_by_a_later_answer(
    partition: Partition,
) -> None:
    answers = Answers(partition)
    answers.run(FIRST, num_deep=3)
    shallow = answers.begun([*FIRST, 1, 2])
    assert (shallow.num_filled(0), shallow.num_filled(1)) == (len(FIRST), 3)
    assert answers.kept.num_bytes < answers.bytes_of(len(FIRST))
    answers.run([*FIRST, 1])
    deep = answers.begun([*FIRST, 1, 2, 3])
    assert deep.num_filled(0) == deep.num_filled(1) == len(FIRST) + 1
    assert answers.kept.num_bytes == answers.bytes_of(len(FIRST) + 1)


def test_the_states_after_a_gap_of_a_block_are_not_used(partition: Partition) -> None:
    answers = Answers(partition)
    answers.run(FIRST, num_deep=2)
    answers.run([*FIRST[:4], 1, 2], num_deep=2)  # splits the segment
    cascade = answers.begun([*FIRST, 1, 2])
    assert (cascade.num_filled(0), cascade.num_filled(1)) == (len(FIRST), 2)


def test_the_least_recently_used_leaf_goes_first(partition: Partition) -> None:
    answers = Answers(partition)
    answers.budget_bytes = answers.bytes_of(len(FIRST), len(SECOND) - len(SYSTEM))
    answers.run(FIRST)
    answers.run(SECOND)
    assert answers.num_reused(FIRST) == len(FIRST)  # used again
    other = [*SYSTEM, 200, 201, 202]
    answers.run(other)
    assert answers.num_reused(SECOND) == len(SYSTEM)
    assert (answers.num_reused(FIRST), answers.num_reused(other)) == (len(FIRST), len(other))
    assert answers.is_within_budget


def test_a_budget_smaller_than_one_conversation_keeps_its_beginning(partition: Partition) -> None:
    answers = Answers(partition)
    answers.budget_bytes = answers.bytes_of(6) + 1
    answers.run(FIRST)
    assert answers.num_reused(FIRST) == 6
    answers.run([*FIRST, 1, 2, 3])
    assert answers.num_reused(FIRST) == 6
    assert answers.is_within_budget
    answers.budget_bytes = 0
    assert answers.num_reused(FIRST) == 6  # one answer more begins with it
    assert answers.kept.num_bytes == 0
    answers.run(FIRST)
    assert answers.kept.num_bytes == 0


def test_the_caches_make_room_for_an_answer_before_it_begins(partition: Partition) -> None:
    answers = Answers(partition, budget_bytes=AMPLE)
    answers.budget_bytes = answers.bytes_of(30)
    answers.run(FIRST)
    answers.run([1, 2, 3])
    answers.leased_bytes = answers.bytes_of(26)
    assert answers.num_reused([1, 2, 3]) == 3
    assert answers.is_within_budget
    answers.leased_bytes = 0
    assert answers.num_reused(FIRST) == 0


def test_an_app_that_floods_loses_its_own_caches(partition: Partition) -> None:
    answers = Answers(partition)
    answers.budget_bytes = answers.bytes_of(30)
    answers.run(FIRST, "quiet")
    for token in range(100, 140):
        answers.run([token, *range(10)], "loud")
        assert answers.is_within_budget
    assert answers.num_reused(FIRST, "quiet") == len(FIRST)
    assert answers.num_reused([139, *range(10)], "loud") == 11


def test_a_long_conversation_stays_while_apps_that_went_away_lose_theirs(
    partition: Partition,
) -> None:
    answers = Answers(partition)
    answers.budget_bytes = answers.bytes_of(len(FIRST) + 2 * 8 + 4 * 8)
    conversation = list(FIRST)
    for turn, app in enumerate(f"gone-{number}" for number in range(1, 9)):
        answers.run([100 + turn, *range(7)], app)
        conversation += [50 + turn, 60 + turn]
        answers.run(conversation, "chat")
    assert answers.num_reused(conversation, "chat") == len(conversation)
    assert answers.num_reused([100, *range(7)], "gone-1") == 0


def test_what_was_cut_from_a_cascade_is_not_kept(partition: Partition) -> None:
    answers = Answers(partition)
    cascade = answers.begun(FIRST)
    for block in range(cascade.num_blocks):
        cascade.fill(block)
    answers.kept.keep("app", cascade, 5)
    assert answers.num_reused(FIRST) == 5


def test_without_caches_there_is_no_tree_left(partition: Partition) -> None:
    answers = Answers(partition)
    answers.run(FIRST)
    answers.kept.clear()
    assert (answers.kept.num_bytes, answers.num_reused(FIRST)) == (0, 0)


def test_random_answers_of_several_threads_leave_exact_caches_and_counts(
    partition: Partition,
) -> None:
    answers = Answers(partition)
    answers.budget_bytes = answers.bytes_of(60)
    failures: list[str] = []

    def answer(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(25):
            prompt = [draw.randrange(3) for _ in range(draw.randrange(2, 14))]
            cascade = answers.run(prompt, f"app-{seed % 2}", draw.choice([None, 1]))
            fresh = Cascade(partition, len(prompt))
            fresh.append(prompt)
            fresh.fill(0)
            if not np.allclose(
                cascade.hidden_states(0, 0), fresh.hidden_states(0, 0), atol=1e-4, rtol=1e-3
            ):
                failures.append(f"{prompt}")

    threads = [threading.Thread(target=answer, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    trees = vars(answers.kept)["_trees"].values()
    nodes = [node for tree in trees for node in nodes_of(vars(tree)["_root"])]
    arrays = [node.token_ids for node in nodes]
    arrays += [state.hidden_states for node in nodes for state in node.blocks]
    arrays += [state.caches for node in nodes for state in node.blocks]
    assert all(array.base is None for array in arrays)  # nothing larger is held
    assert answers.kept.num_bytes == sum(array.nbytes for array in arrays)
    assert answers.is_within_budget


def nodes_of(root: Any) -> list[Any]:
    children = list(root.children.values())
    return children + [node for child in children for node in nodes_of(child)]
