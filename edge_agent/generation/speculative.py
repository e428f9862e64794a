"""Drafts: the device goes on from its own tokens, the cloud confirms or corrects, and the device drafts on meanwhile.

Speculative decoding (arXiv 2211.17192) over a link. In verified mode every token is judged, and what comes out is the
cloud's text, token for token, whoever drafted it and however often a question was asked, since a draw depends on
nothing but the seed and the position. In collaborative mode a token of which an exit is sure needs no judge (ADR 0028).
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from itertools import takewhile
from math import prod
from typing import Final

from edge_agent.generation.acceptance_rate import AcceptanceRate
from edge_agent.generation.decoder import Decoder, GeneratedToken
from edge_agent.generation.draft_policy import worth_drafting, worth_guessing
from edge_agent.generation.prompt_lookup import PromptLookup
from edge_agent.measurements import Measurements
from edge_agent.session.cloud_session import CloudSession
from fleet.protocol.messages import MAX_DRAFT, Verified
from fleet.protocol.modes import CLOUD, FALLBACK, LOOKUP, exit_source

SLICE_S: Final = (
    0.2  # a wait for the cloud lasts at most so long before the caller may look at its own deadline
)
MAX_LOOKUP: Final = 8


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A token that waits for the cloud's word; `chance` is the probability of a yes.

    `confidence` is the exit's, None where the token was looked up. `is_sure` says whether an exit would emit it.
    """

    token_id: int
    logprob: float
    source: str
    chance: float
    confidence: float | None
    is_sure: bool

    def as_own(self) -> GeneratedToken:
        """The device's own token, without a judge."""
        return GeneratedToken(
            self.token_id, self.logprob, self.source if self.is_sure else FALLBACK
        )


class SpeculativeDecoder:
    """The drafts of one sequence, which stand at the end of the decoder's text.

    The cloud is being asked about the first `num_asked` of them, when `asked_trusting` about the unsure ones alone.
    """

    def __init__(
        self,
        decoder: Decoder,
        uplink: CloudSession,
        acceptance: AcceptanceRate,
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
        self._asked_trusting = False
        self._asked_at = 0.0

    @property
    def has_drafts(self) -> bool:
        return bool(self._drafts)

    def advance(
        self, max_tokens: int, *, trusts_exits: bool = False, wait_ms: int | None = None
    ) -> list[GeneratedToken]:
        """One piece of work: drafts a token, asks, or takes the verdict; the tokens that are certain by it.

        With `trusts_exits` a token of which an exit is sure is certain once all before it are, nothing is looked up,
        behind which an exit could have been sure, and the device goes on alone when no verdict comes within `wait_ms`.
        At most `max_tokens` are drafted; with 0 what there is is settled. Waits at most `SLICE_S` seconds.
        """
        if self._num_asked and not self._uplink.has_question:  # lost
            self._num_asked = 0
            if trusts_exits:
                return self.release()
        if trusts_exits and not self._num_asked and (tokens := self._trusted()):
            return tokens
        room = min(max_tokens, self._max_draft) - len(self._drafts)
        may_draft = room > 0 and self._may_draft()
        if not self._num_asked:
            if may_draft and (not self._drafts or self._is_worth_another()):
                self._draft(room, trusts_exits=trusts_exits)
                return self._trusted() if trusts_exits else []
            if not self._drafts:
                return []
            self._ask(trusts_exits=trusts_exits, wait_ms=wait_ms)
        verdict = self._uplink.verdict(0.0 if may_draft else SLICE_S)
        if verdict:
            return self._settle(verdict)
        if may_draft:
            self._draft(room, trusts_exits=trusts_exits)
        return []

    def release(self) -> list[GeneratedToken]:
        """Gives the drafts out as the device's own tokens, without the cloud; looked up ones end them."""
        self._uplink.withdraw()
        own = list(takewhile(lambda draft: draft.confidence is not None, self._drafts))
        if len(own) < len(self._drafts):
            self._rewind(self._num_certain + len(own))
        self._drafts = []
        self._num_asked = 0
        return [draft.as_own() for draft in own]

    @property
    def _num_certain(self) -> int:
        return len(self._decoder.text) - len(self._drafts)

    @property
    def _survival(self) -> float:
        """The probability that every draft is accepted."""
        return prod(draft.chance for draft in self._drafts)

    def _trusted(self) -> list[GeneratedToken]:
        """The sure drafts that nothing unsure is before."""
        sure = list(takewhile(lambda draft: draft.is_sure, self._drafts))
        del self._drafts[: len(sure)]
        return [draft.as_own() for draft in sure]

    def _may_draft(self) -> bool:
        if self._drafts and self._drafts[-1].token_id in self._eos_token_ids:
            return False
        if not self._num_asked:
            return True
        measured = self._measurements.snapshot()
        elapsed_s = time.monotonic() - self._asked_at
        wait_s = max(0.0, measured.round_trip_s - elapsed_s)
        return self._decoder.is_free and worth_guessing(self._survival, measured.step_s, wait_s)

    def _is_worth_another(self) -> bool:
        measured = self._measurements.snapshot()
        return worth_drafting(self._survival, measured.step_s, measured.round_trip_s)

    def _draft(self, room: int, *, trusts_exits: bool) -> None:
        choice = self._decoder.choose()
        is_certain = trusts_exits and choice.is_sure
        chance = 1.0 if is_certain else self._acceptance.probability(choice.confidence)
        source = exit_source(choice.exit_layer)
        drafts = [
            Draft(
                token_id=choice.token_id,
                logprob=choice.logprob,
                source=source,
                chance=chance,
                confidence=choice.confidence,
                is_sure=choice.is_sure,
            )
        ]
        if not (trusts_exits or choice.is_sure) and self._acceptance.lookup_probability > chance:
            drafts = self._looked_up(min(room, MAX_LOOKUP)) or drafts
        self.num_drafted += len(drafts) if self._drafts or not is_certain else 0
        self._drafts += drafts
        self._decoder.text += [draft.token_id for draft in drafts]

    def _looked_up(self, room: int) -> list[Draft]:
        """What followed the last time that the text went like this."""
        self._lookup.extend(self._decoder.text[len(self._lookup) :])
        chance = self._acceptance.lookup_probability
        return [
            Draft(
                token_id=token_id,
                logprob=0.0,
                source=LOOKUP,
                chance=chance,
                confidence=None,
                is_sure=False,
            )
            for token_id in self._lookup.propose(room)
        ]

    def _ask(self, *, trusts_exits: bool, wait_ms: int | None) -> None:
        asked = self._drafts
        while trusts_exits and asked[-1].is_sure:
            asked = asked[:-1]
        self._num_asked = len(asked)
        self._asked_trusting = trusts_exits
        self._asked_at = time.monotonic()
        start = self._num_certain - 1
        self._decoder.upload(start + len(asked))
        trusted = [i for i, draft in enumerate(asked) if draft.is_sure] if trusts_exits else []
        self._uplink.ask(
            start, [draft.token_id for draft in asked], trusted, wait_ms, gives_up=trusts_exits
        )

    def _settle(self, verdict: Verified) -> list[GeneratedToken]:
        asked = self._drafts[: self._num_asked]
        self._num_asked = 0
        tokens = []
        for i, draft in enumerate(asked[: verdict.accepted + 1]):
            is_accepted = i < verdict.accepted
            if self._asked_trusting and draft.is_sure:
                tokens.append(draft.as_own())
                continue
            self._learn(draft, is_accepted=is_accepted)
            if is_accepted:
                source = CLOUD if self._asked_trusting else draft.source
                tokens.append(GeneratedToken(draft.token_id, verdict.logprobs[i], source))
        if verdict.token_id is None:
            del self._drafts[: len(asked)]
        else:
            self._rewind(self._num_certain + verdict.accepted)
            self._drafts = []
            self._decoder.text.append(verdict.token_id)
            tokens.append(GeneratedToken(verdict.token_id, verdict.logprobs[-1], CLOUD))
        return tokens

    def _learn(self, draft: Draft, *, is_accepted: bool) -> None:
        self._acceptance.update(draft.confidence, accepted=is_accepted)
        if (
            not self._asked_trusting
        ):  # of the unsure ones alone, which are judged then, that share would be another
            self._measurements.judged(is_accepted=is_accepted)
        if draft.confidence is None:
            return
        if draft.is_sure:
            self.num_judged += 1
            self.num_agreed += is_accepted
        else:
            self._measurements.guessed(is_right=is_accepted)

    def _rewind(self, num_tokens: int) -> None:
        self._decoder.truncate(num_tokens)
        self._uplink.rewind(num_tokens)
        self._lookup.truncate(num_tokens)
