"""The benchmark of proposals: its sets, its replay of answers, and its figures."""

from __future__ import annotations

from pathlib import Path

from benchmarks.draft_replay import RecordedAnswer, replay, replay_answer, usual_cost
from benchmarks.draft_sets import DraftPrompt, file_prompts, spread, trigger_prompts
from edge_agent.generation.combined_proposer import CombinedProposer
from edge_agent.generation.suffix_table import SuffixTable


def cost(num_positions: int) -> float:
    return 1.0 + 0.1 * (num_positions - 1)


def test_the_events_are_prompts_of_four_triggers() -> None:
    prompts = trigger_prompts()
    assert len(prompts) == 40
    assert [prompt.trigger for prompt in prompts[:4]] == ["climate", "doors", "pumps", "energy"]
    assert prompts[0].text.startswith("Room kitchen: ")


def test_prompts_are_spread_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join("abcdefghij"), encoding="utf-8")
    assert [prompt.text for prompt in file_prompts(path, 3)] == ["a", "d", "g"]
    assert spread(["a", "b"], 5) == ["a", "b"]
    assert DraftPrompt("a").request(max_new_tokens=3).max_new_tokens == 3


def test_a_replayed_answer_takes_a_step_for_each_first_token_that_was_not_proposed() -> None:
    table = SuffixTable()
    table.add(range(40))
    answer = RecordedAnswer([99, 0, 1, 2], [3, 4, 5, 6, 77, 8], None)
    chunks = replay_answer(answer, CombinedProposer(table, cost), cost)
    assert chunks == [5, 1]
    assert replay_answer(answer, CombinedProposer(SuffixTable(), cost), cost) == [1] * 5


def test_a_replay_compares_the_text_alone_with_past_answers_of_its_trigger() -> None:
    answers = [RecordedAnswer([1, 2, 3], list(range(10, 40)), "doors") for _ in range(4)]
    alone = replay(answers, cost, with_tables=False)
    both = replay(answers, cost)
    assert (alone.tokens_per_step, alone.speedup) == (1.0, 1.0)
    assert both.tokens_per_step > 2
    assert 1 < both.speedup < both.tokens_per_step
    assert replay([], cost).speedup == 1.0


def test_a_replay_expects_a_quarter_of_a_step_for_a_further_position() -> None:
    assert [usual_cost(n) for n in (1, 2, 5)] == [1.0, 1.25, 2.0]
