"""The proposer of an answer: the better source, and no more than pays."""

from __future__ import annotations

from collections.abc import Callable

from edge_agent.generation.combined_proposer import OWN_TEXT, PAST_TEXTS, CombinedProposer
from edge_agent.generation.proposer import Proposer
from edge_agent.generation.suffix_table import SuffixTable

TEXT = list(range(10, 50))
MAX_TOKENS = 16


def cheap(num_positions: int) -> float:
    return 1.0 + 0.1 * (num_positions - 1)


def dear(num_positions: int) -> float:
    return float(num_positions)


def table_of(*texts: list[int]) -> SuffixTable:
    table = SuffixTable()
    for text in texts:
        table.add(text)
    return table


def proposer_of(
    table: SuffixTable, text: list[int], cost: Callable[[int], float] = cheap
) -> CombinedProposer:
    proposer = CombinedProposer(table, cost)
    proposer.extend(text)
    return proposer


def test_it_proposes_from_its_own_text_and_from_the_past() -> None:
    own: Proposer = proposer_of(SuffixTable(), [*TEXT, 1, *TEXT[:10]])
    assert own.propose(8) == TEXT[10:18]
    past = proposer_of(table_of(TEXT), [1, *TEXT[:10]])
    assert past.propose(3) == TEXT[10:13]
    assert past.propose(0) == []


def test_the_longer_match_wins() -> None:
    table = table_of([*TEXT[:10], 5, 6, 7])
    own = [*TEXT[7:10], 8, 9, 1, *TEXT[:10]]
    assert proposer_of(table, own).propose(2) == [5, 6]


def test_nothing_is_proposed_when_a_longer_chunk_costs_as_much_as_its_steps() -> None:
    proposer = proposer_of(table_of(TEXT), TEXT[:10], dear)
    assert proposer.propose(MAX_TOKENS) == []


def test_a_text_that_goes_back_proposes_again() -> None:
    proposer = proposer_of(table_of(TEXT), [*TEXT[:10], 1, 2])
    assert proposer.propose(1) == []
    proposer.truncate(10)
    assert len(proposer) == 10
    assert proposer.propose(1) == TEXT[10:11]


def test_wrong_proposals_make_the_source_silent_and_right_ones_bring_it_back() -> None:
    table = table_of(TEXT)
    proposer = proposer_of(table, TEXT[:10])
    num_rounds = 0
    while proposed := proposer.propose(MAX_TOKENS):
        proposer.learn(len(proposed), 0)
        num_rounds += 1
        assert num_rounds < 100
    assert num_rounds > 1
    later = proposer_of(table, TEXT[:10])
    for guess in table.guess(TEXT[:10], 4):
        for _ in range(200):
            table.stats.update(PAST_TEXTS, guess, is_right=True)
    assert later.propose(MAX_TOKENS)


def test_guesses_after_the_first_wrong_one_are_not_counted() -> None:
    proposer = proposer_of(table_of(TEXT), TEXT[:10])
    assert len(proposer.propose(8)) == 8
    proposer.learn(8, 3)
    memory = proposer.memories[PAST_TEXTS]
    assert (memory.num_right, memory.num_tried) == (3, 4)
    assert proposer.memories[OWN_TEXT].num_tried == 0
    proposer.learn(8, 8)
    assert memory.num_tried == 4


def test_an_answer_that_is_worse_than_usual_gets_fewer_proposals() -> None:
    table = table_of(TEXT)
    proposer = proposer_of(table, TEXT[:4], lambda n: 1.0 + 0.35 * (n - 1))
    first = proposer.propose(MAX_TOKENS)
    chances = [table.stats.chance(PAST_TEXTS, guess) for guess in table.guess(TEXT[:4], 8)]
    for _ in range(3):
        proposer.memories[PAST_TEXTS].update(0.9, is_right=False)
    assert len(proposer.propose(MAX_TOKENS)) < len(first)
    assert chances == [table.stats.chance(PAST_TEXTS, g) for g in table.guess(TEXT[:4], 8)]
