"""Prompt lookup against a search through the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.generation.prompt_lookup import MAX_NGRAM, MIN_NGRAM, PromptLookup

Ids = st.lists(st.integers(0, 3), max_size=40)


def searched(ids: list[int], max_tokens: int) -> list[int]:
    """Return the tokens that followed the most recent earlier place with the same last tokens, for
    the longest n-gram that has one.
    """
    for n in range(min(MAX_NGRAM, len(ids)), MIN_NGRAM - 1, -1):
        for end in range(len(ids) - 1, n - 1, -1):
            if ids[end - n : end] == ids[-n:]:
                return ids[end : end + max_tokens]
    return []


@given(Ids, st.integers(1, 5))
def test_it_proposes_what_followed_the_last_time(ids: list[int], max_tokens: int) -> None:
    lookup = PromptLookup()
    lookup.extend(ids)
    assert lookup.propose(max_tokens) == searched(ids, max_tokens)


@given(Ids, st.integers(0, 40), Ids)
def test_what_was_cut_off_is_forgotten(ids: list[int], cut: int, more: list[int]) -> None:
    lookup = PromptLookup()
    lookup.extend(ids)
    lookup.truncate(cut)
    lookup.extend(more)
    left = ids[:cut] + more
    assert len(lookup) == len(left)
    assert lookup.propose(4) == searched(left, 4)


def test_a_text_without_repetition_has_nothing_to_propose() -> None:
    lookup = PromptLookup()
    lookup.extend(range(50))
    assert lookup.propose(4) == []
