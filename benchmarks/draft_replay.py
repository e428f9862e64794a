"""Proposals replayed over recorded answers: tokens a step and the expected speed, without a model.

A greedy answer does not depend on proposals, so its tokens tell which of them would have been
right. The constants of the proposers were chosen by these figures (docs/adr/0053).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from msgspec import Struct

from edge_agent.generation.combined_proposer import CombinedProposer
from edge_agent.generation.decoder import MAX_PROPOSALS
from edge_agent.generation.proposal_budget import ProposalBudget
from edge_agent.generation.suffix_table import SuffixTable
from edge_agent.measurements import FURTHER_COST


class RecordedAnswer(NamedTuple):
    """The tokens of a prompt and of its answer, and the trigger that made the prompt."""

    prompt_ids: list[int]
    token_ids: list[int]
    trigger: str | None


class ReplayFigures(Struct, frozen=True, kw_only=True):
    """Figures after the first token: tokens a step, and the speed against one token a step."""

    tokens_per_step: float
    speedup: float


def usual_cost(num_positions: int) -> float:
    """Return the time of a chunk in steps, with the cost that a device expects at first."""
    return 1 + FURTHER_COST * (num_positions - 1)


def replay(
    answers: Iterable[RecordedAnswer],
    chunk_cost: Callable[[int], float],
    *,
    with_tables: bool = True,
) -> ReplayFigures:
    """Return the figures of answers in this order, beginning with empty tables."""
    tables: dict[str | None, SuffixTable] = {}
    num_tokens = 0
    chunks: list[int] = []
    for answer in answers:
        table = tables.setdefault(answer.trigger, SuffixTable()) if with_tables else SuffixTable()
        chunks += replay_answer(answer, CombinedProposer(table, chunk_cost), chunk_cost)
        num_tokens += len(answer.token_ids) - 1
        table.add([*answer.prompt_ids, *answer.token_ids])
    cost = sum(map(chunk_cost, chunks))
    return ReplayFigures(
        tokens_per_step=round(num_tokens / max(1, len(chunks)), 3),
        speedup=round(num_tokens * chunk_cost(1) / cost, 3) if cost else 1.0,
    )


def replay_answer(
    answer: RecordedAnswer, proposer: CombinedProposer, chunk_cost: Callable[[int], float]
) -> list[int]:
    """Return the number of positions of each step after the first token."""
    rest = answer.token_ids[1:]
    proposer.extend([*answer.prompt_ids, *answer.token_ids[:1]])
    budget = ProposalBudget()
    chunks = []
    while rest:
        max_tokens = 0 if budget.is_spent else min(MAX_PROPOSALS, len(rest) - 1)
        proposed = proposer.propose(max_tokens) if max_tokens else []
        num_right = 0
        while num_right < len(proposed) and proposed[num_right] == rest[num_right]:
            num_right += 1
        if proposed:
            proposer.learn(len(proposed), num_right)
        budget.count(num_right + 1, chunk_cost(len(proposed) + 1) / chunk_cost(1))
        proposer.extend(rest[: num_right + 1])
        rest = rest[num_right + 1 :]
        chunks.append(len(proposed) + 1)
    return chunks
