"""The suffix index: the newest places where the end of a text occurred, and what followed there."""

from __future__ import annotations

import random
from collections.abc import Sequence

from edge_agent.generation.suffix_index import MAX_MATCH, SEPARATOR, SuffixIndex


def index_of(*texts: Sequence[int]) -> SuffixIndex:
    index = SuffixIndex()
    for text in texts:
        index.extend([*text, SEPARATOR])
    return index


def tokens(index: SuffixIndex, tail: Sequence[int], max_tokens: int = 8) -> list[int]:
    return [guess.token_id for guess in index.guess(tail, max_tokens)]


def test_what_followed_is_guessed_to_the_end_of_that_text() -> None:
    index = index_of([1, 2, 3, 4, 5, 6], [7, 8])
    assert tokens(index, [1, 2, 3]) == [4, 5, 6]
    assert tokens(index, [1, 2, 3], 2) == [4, 5]
    assert tokens(index, [9]) == []
    assert tokens(index, []) == []


def test_a_guess_has_the_length_of_its_match() -> None:
    text = list(range(100))
    guesses = index_of(text).guess(text[10:14], 3)
    assert [guess.match for guess in guesses] == [4, 5, 6]
    assert index_of(text).guess(text[:60], 1)[0].match == MAX_MATCH


def test_a_longer_match_outvotes_a_newer_one() -> None:
    index = index_of([1, 2, 3, 4, 5], [9, 2, 3, 4, 6])
    assert tokens(index, [1, 2, 3, 4]) == [5]
    assert tokens(index, [9, 2, 3, 4]) == [6]


def test_the_token_that_followed_more_often_is_guessed_with_its_share() -> None:
    index = index_of([1, 2, 3, 4, 7], [1, 2, 3, 5, 8], [1, 2, 3, 4, 7])
    guesses = index.guess([1, 2, 3], 8)
    assert [guess.token_id for guess in guesses] == [4, 7]
    assert [round(guess.share, 2) for guess in guesses] == [0.67, 1.0]


def test_a_single_token_is_enough_when_no_longer_end_occurred() -> None:
    assert tokens(index_of([1, 2, 3, 4, 5]), [8, 9, 3]) == [4, 5]


def test_the_end_of_the_index_is_no_place_of_its_own() -> None:
    index = SuffixIndex()
    index.extend([1, 2, 3])
    assert index.guess(index.tail(), 4) == []
    index.extend([1, 2, 3])
    assert tokens(index, index.tail()) == [1, 2, 3]


def test_dropped_tokens_leave_no_trace() -> None:
    draw = random.Random(4)
    text = [draw.randrange(6) for _ in range(300)]
    index = SuffixIndex()
    index.extend(text)
    index.truncate(120)
    index.extend(text[:90])
    fresh = SuffixIndex()
    fresh.extend(text[:120] + text[:90])
    for end in range(1, 200):
        assert index.guess(text[:end], 8) == fresh.guess(text[:end], 8)
