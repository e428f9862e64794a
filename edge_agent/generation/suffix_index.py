"""Texts of the past as token ids, searched for the places where the end of a text occurred."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Sequence
from typing import Final, NamedTuple

ORDERS: Final = (3, 1)
"""Lengths of the n-grams by which places are found. The shorter one is used if no place has the
longer one.
"""
MAX_PLACES: Final = 8
MAX_LINKS: Final = 64  # followed to find them; n-grams of the same hash share a chain
MAX_MATCH: Final = 32
NUM_HEADS: Final = 1 << 13
SEPARATOR: Final = -1  # between two texts


class Guess(NamedTuple):
    """A token that may come next.

    `match` is the number of tokens before it that were found in the same order, at most
    `MAX_MATCH` of the text plus the guesses before this one. `share` is the weight of the places
    that this token followed, among all places found.
    """

    token_id: int
    match: int
    share: float


class SuffixIndex:
    """Token ids of one or more texts.

    It answers as a suffix tree with counts does (SuffixDecoding, arXiv 2411.04975), from the newest
    places alone: chains of places with the same hash, as in DEFLATE (RFC 1951, section 4), cost
    twelve bytes a token.
    """

    def __init__(self) -> None:
        self._ids = array("i")
        self._chains = [_Chain(order) for order in ORDERS]

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def token_ids(self) -> array[int]:
        """All token ids, with separators."""
        return self._ids

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append tokens to the newest text."""
        for token_id in token_ids:
            self._ids.append(token_id)
            for chain in self._chains:
                chain.push(self._ids)

    def truncate(self, num_tokens: int) -> None:
        """Drop every token from `num_tokens` on."""
        while len(self._ids) > num_tokens:
            for chain in self._chains:
                chain.pop(self._ids)
            self._ids.pop()

    def tail(self) -> array[int]:
        """Return the end of the newest text, as long as a match can be."""
        return self._ids[-MAX_MATCH:]

    def guess(self, tail: Sequence[int], max_tokens: int) -> list[Guess]:
        """Return at most `max_tokens` tokens that may follow a text which ends with `tail`.

        At each place found, the tokens that followed vote with the length of the match. The places
        that agree with a guess vote on the next one.
        """
        places = self._find(tail)
        guesses: list[Guess] = []
        while places and len(guesses) < max_tokens:
            token_id, share = self._vote(places)
            if token_id == SEPARATOR:
                break
            places = [(end, match) for end, match in places if self._ids[end] == token_id]
            guesses.append(Guess(token_id, max(match for _, match in places), share))
            places = [(end + 1, match + 1) for end, match in places if end + 1 < len(self._ids)]
        return guesses

    def _vote(self, places: list[tuple[int, int]]) -> tuple[int, float]:
        """Return the token with the most votes, and its share of them."""
        votes: dict[int, int] = defaultdict(int)
        for end, match in places:
            votes[self._ids[end]] += match
        token_id = max(votes, key=votes.__getitem__)
        return token_id, votes[token_id] / sum(votes.values())

    def _find(self, tail: Sequence[int]) -> list[tuple[int, int]]:
        """Return the newest places where the longest n-gram at the end of `tail` occurred: the
        position after each, and the length of the match there.
        """
        for chain in self._chains:
            places = []
            for end in chain.ends(tail):
                match = self._match(end, tail)
                if match >= chain.order:
                    places.append((end, match))
                    if len(places) == MAX_PLACES:
                        break
            if places:
                return places
        return []

    def _match(self, end: int, tail: Sequence[int]) -> int:
        """Return how many tokens before `end` are the last ones of `tail`; 0 at the end of all."""
        if end == len(self._ids):
            return 0
        length = 0
        before = self._ids[max(0, end - MAX_MATCH) : end]
        for mine, theirs in zip(reversed(before), reversed(tail), strict=False):
            if mine != theirs:
                break
            length += 1
        return length


class _Chain:
    """For each n-gram of `order` tokens the places where it ends, newest first, by its hash."""

    def __init__(self, order: int) -> None:
        self.order = order
        self._heads = array("i", [0]) * NUM_HEADS
        self._previous = array("i")

    def push(self, token_ids: array[int]) -> None:
        """Add the place at the end of `token_ids`."""
        key = self._key(token_ids)
        self._previous.append(self._heads[key])
        self._heads[key] = len(token_ids)

    def pop(self, token_ids: array[int]) -> None:
        """Remove the place at the end of `token_ids`, which is the newest."""
        self._heads[self._key(token_ids)] = self._previous.pop()

    def ends(self, tail: Sequence[int]) -> list[int]:
        """Return the newest places whose n-gram has the hash of the last one of `tail`."""
        end = self._heads[self._key(tail)]
        ends: list[int] = []
        while end and len(ends) < MAX_LINKS:
            ends.append(end)
            end = self._previous[end - 1]
        return ends

    def _key(self, token_ids: Sequence[int]) -> int:
        return hash(tuple(token_ids[-self.order :])) % NUM_HEADS
