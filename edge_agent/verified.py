"""Verified mode: the device drafts with its exits, the cloud confirms or corrects, and the device drafts on meanwhile.

Speculative decoding (arXiv 2211.17192) over a link: what comes out is the cloud's text, token for token, whoever
drafted it and however often a question was asked, since a draw depends on nothing but the seed and the position.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from itertools import takewhile
from math import prod
from typing import Final

from edge_agent.acceptance import Acceptance
from edge_agent.decoder import Decoder, GeneratedToken
from edge_agent.drafting import worth_drafting
from edge_agent.lookup import PromptLookup
from edge_agent.measurements import Measurements
from edge_agent.uplink import Uplink
from fleet.messages import MAX_DRAFT, Verified
from fleet.policy import CLOUD, FALLBACK, LOOKUP, exit_source

SLICE_S: Final = 0.2  # a wait for the cloud lasts at most so long before the caller may look at its own deadline
MIN_SURVIVAL: Final = 0.1  # what is drafted while a question is out is needed with at least this probability
MAX_LOOKUP: Final = 8


@dataclass(frozen=True)
class Draft:
    """A token that waits for the cloud's word; `chance` is the probability of a yes.

    `confidence` is the exit's, None where the token was looked up.
    """

    token_id: int
    logprob: float
    source: str
    chance: float
    confidence: float | None
    is_sure: bool


class VerifiedRun:
    """The drafts of one sequence, which stand at the end of the decoder's text."""

    def __init__(
        self,
        decoder: Decoder,
        uplink: Uplink,
        acceptance: Acceptance,
        measurements: Measurements,
        eos_token_ids: Collection[int],
        max_draft: int = MAX_DRAFT,
    ) -> None:
        self.num_drafted = self.num_judged = self.num_agreed = 0
        self._decoder = decoder
        self._uplink = uplink
        self._acceptance = acceptance
        self._measurements = measurements
        self._eos_token_ids = eos_token_ids
        self._max_draft = max_draft
        self._lookup = PromptLookup()
        self._drafts: list[Draft] = []
        self._num_asked = 0
        self._started = 0.0

    @property
    def has_drafts(self) -> bool:
        return bool(self._drafts)

    def advance(self, max_tokens: int, *, draft: bool = True) -> list[GeneratedToken]:
        """One piece of work: drafts a token, asks, or takes the verdict; the tokens that are confirmed by it.

        With `draft` false nothing new is drafted, and what was is settled. Waits at most `SLICE_S` seconds.
        """
        room = min(max_tokens, self._max_draft) - len(self._drafts)
        may_draft = draft and room > 0 and self._may_draft()
        if not self._num_asked:
            if may_draft and (not self._drafts or self._is_worth_another()):
                self._draft(room)
                return []
            self._ask()
        verdict = self._uplink.verdict(0.0 if may_draft else SLICE_S)
        if verdict:
            return self._settle(verdict)
        if may_draft:
            self._draft(room)
        return []

    def release(self) -> list[GeneratedToken]:
        """Gives the drafts out as the device's own tokens, without the cloud; looked up ones end them."""
        self._uplink.withdraw()
        own = list(takewhile(lambda draft: draft.confidence is not None, self._drafts))
        if len(own) < len(self._drafts):
            num_tokens = self._num_confirmed + len(own)
            self._rewind(num_tokens)
        self._drafts, self._num_asked = [], 0
        return [GeneratedToken(d.token_id, d.logprob, d.source if d.is_sure else FALLBACK) for d in own]

    @property
    def _num_confirmed(self) -> int:
        return len(self._decoder.text) - len(self._drafts)

    def _may_draft(self) -> bool:
        if self._drafts and self._drafts[-1].token_id in self._eos_token_ids:
            return False
        return not self._num_asked or prod(draft.chance for draft in self._drafts) >= MIN_SURVIVAL

    def _is_worth_another(self) -> bool:
        measured = self._measurements.snapshot()
        chances = [draft.chance for draft in self._drafts]
        return worth_drafting(chances, time.monotonic() - self._started, measured.step_s, measured.round_trip_s)

    def _draft(self, room: int) -> None:
        if not self._drafts:
            self._started = time.monotonic()
        choice = self._decoder.choose()
        chance = self._acceptance.probability(choice.confidence)
        source = exit_source(choice.exit_layer)
        drafts = [Draft(choice.token_id, choice.logprob, source, chance, choice.confidence, choice.is_sure)]
        if not choice.is_sure and self._acceptance.lookup_probability > chance:
            drafts = self._looked_up(min(room, MAX_LOOKUP)) or drafts
        self._drafts += drafts
        self._decoder.text += [draft.token_id for draft in drafts]
        self.num_drafted += len(drafts)

    def _looked_up(self, room: int) -> list[Draft]:
        """What followed the last time that the text went like this."""
        self._lookup.extend(self._decoder.text[len(self._lookup) :])
        chance = self._acceptance.lookup_probability
        return [Draft(token_id, 0.0, LOOKUP, chance, None, True) for token_id in self._lookup.propose(room)]

    def _ask(self) -> None:
        start = self._num_confirmed - 1
        self._decoder.upload(start + len(self._drafts))
        self._num_asked = len(self._drafts)
        self._uplink.ask_verify(start, [draft.token_id for draft in self._drafts])

    def _settle(self, verdict: Verified) -> list[GeneratedToken]:
        asked, self._num_asked = self._drafts[: self._num_asked], 0
        for draft, is_accepted in zip(asked, [True] * verdict.accepted + [False], strict=False):
            self._acceptance.update(draft.confidence, accepted=is_accepted)
            if draft.confidence is not None and draft.is_sure:
                self.num_judged += 1
                self.num_agreed += is_accepted
        self._measurements.verified(len(asked), verdict.accepted)
        tokens = [
            GeneratedToken(draft.token_id, logprob, draft.source)
            for draft, logprob in zip(asked, verdict.logprobs, strict=False)
        ][: verdict.accepted]
        if verdict.token_id is None:
            del self._drafts[: len(asked)]
        else:
            self._rewind(self._num_confirmed + verdict.accepted)
            self._drafts = []
            self._decoder.text.append(verdict.token_id)
            tokens.append(GeneratedToken(verdict.token_id, verdict.logprobs[-1], CLOUD))
        self._started = time.monotonic()
        return tokens

    def _rewind(self, num_tokens: int) -> None:
        self._decoder.truncate(num_tokens)
        self._uplink.rewind(num_tokens)
        self._lookup.truncate(num_tokens)
