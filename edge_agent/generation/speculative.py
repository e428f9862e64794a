"""Speculative decoding over a link: the device drafts, the cloud accepts or corrects the drafts,
and the device drafts further tokens meanwhile.

The method follows arXiv 2211.17192, with a simpler test: the cloud accepts a draft only if it
chooses the same token. In verified mode the cloud judges every token, and the result is exactly the
cloud's text. Drafts and repeated requests do not change this text, because the noise of the
sampling depends only on seed, position and token. In collaborative mode a token of a confident exit
needs no verdict (ADR 0028).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import prod
from typing import Final

from msgspec import UNSET

from edge_agent.answer_tracer import AnswerTracer, TokenOrigin
from edge_agent.generation.acceptance_rate import AcceptanceRate
from edge_agent.generation.combined_proposer import MAX_CHANCE
from edge_agent.generation.decoder import (
    Decoder,
    ExitChoice,
    GeneratedToken,
    RejectedProposal,
    never,
)
from edge_agent.generation.draft_policy import worth_drafting, worth_guessing
from edge_agent.generation.prompt_lookup import PromptLookup
from edge_agent.generation.proposal_stats import ShortMemory
from edge_agent.measurements import Measurements
from edge_agent.session.cloud_session import CloudSession
from fleet.protocol.messages import MAX_DRAFT, TopTokens, Verified
from fleet.protocol.modes import CLOUD, FALLBACK, LOOKUP, exit_source

SLICE_S: Final = 0.2  # longest wait for a verdict in one `advance`; the caller checks deadlines
MAX_LOOKUP: Final = 8


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A token without a verdict. `chance` is the probability that the cloud accepts it.

    `confidence` is that of the exit, or None for a token from prompt lookup or a kept proposal.
    `is_confident` means that an exit would emit the token. `proposal` is one that the exit
    rejected. `emitted_token` is the one that an exit would emit here, also if a proposal is kept in
    its place; None if no exit is confident.
    """

    token_id: int
    logprob: float
    source: str
    chance: float
    confidence: float | None
    is_confident: bool
    top: TopTokens = ()
    proposal: RejectedProposal | None = None
    emitted_token: int | None = None

    def as_own(self) -> GeneratedToken:
        """Return this draft as a token that the device emits without a verdict."""
        source = self.source if self.is_confident else FALLBACK
        return self.as_token(self.logprob, source, self.top)

    def as_token(self, logprob: float, source: str, top: TopTokens) -> GeneratedToken:
        """Return this draft as a token of the answer."""
        return GeneratedToken(self.token_id, logprob, source, top, self.confidence)


class SpeculativeDecoder:
    """Speculative decoding of one sequence. The drafts are the last tokens of `decoder.text`.

    The pending request contains the first `_num_asked` drafts. `_asked_trusting` means that this
    request lets the worker accept drafts of confident exits without a check.
    """

    def __init__(
        self,
        decoder: Decoder,
        cloud_session: CloudSession,
        acceptance: AcceptanceRate,
        measurements: Measurements,
        eos_token_ids: Collection[int],
        max_draft: int = MAX_DRAFT,
        tracer: AnswerTracer | None = None,
    ) -> None:
        self.num_drafted = 0
        self.num_judged = 0
        self.num_agreed = 0
        self._decoder = decoder
        self._cloud_session = cloud_session
        self._acceptance = acceptance
        self._measurements = measurements
        self._eos_token_ids = eos_token_ids
        self._max_draft = max_draft
        self._lookup = PromptLookup()
        self._memory = ShortMemory()
        self._drafts: list[Draft] = []
        self._num_asked = 0
        self._asked_trusting = False
        self._asked_at = 0.0
        self._has_begun = False
        self._has_verdict = False
        self._tracer = tracer

    @property
    def has_drafts(self) -> bool:
        return bool(self._drafts)

    def advance(
        self, max_tokens: int, *, trusts_exits: bool = False, wait_ms: int | None = None
    ) -> list[GeneratedToken]:
        """Draft a token, send a request or process a verdict; return the tokens that became
        certain. A certain token belongs to the answer and never changes.

        With `trusts_exits`, a token of a confident exit is certain as soon as all tokens before it
        are certain, and the device emits its own drafts if no verdict comes within `wait_ms`,
        plus the time that the session allows for positions that the worker has not acknowledged.
        Prompt lookup is then off: it drafts tokens without running the exits, so the device would
        not notice that an exit is confident and the token needs no verdict.

        The first request has the drafts of one step, so that the first token comes soon; the device
        drafts on meanwhile, in chunks that end before the verdict is expected.

        A call adds drafts only while there are fewer than `max_tokens` drafts, and fewer than the
        decoder's `max_draft`. With 0 it adds none: it requests a verdict on the existing drafts,
        unless a request is pending already. Each call waits for a verdict for at most `SLICE_S`
        seconds.
        """
        if self._num_asked and not self._cloud_session.has_request:
            # The session has withdrawn the request, or could not send it.
            self._num_asked = 0
            if trusts_exits:
                return self.release()
        if trusts_exits and not self._num_asked and (tokens := self._pop_confident()):
            return tokens
        room = min(max_tokens, self._max_draft) - len(self._drafts)
        may_draft = room > 0 and self._may_draft()
        if not self._num_asked:
            if may_draft and (not self._drafts or (self._has_begun and self._is_worth_another())):
                self._draft(room, trusts_exits=trusts_exits)
                return self._pop_confident() if trusts_exits else []
            if not self._drafts:
                return []
            self._ask(trusts_exits=trusts_exits, wait_ms=wait_ms)
        response = self._cloud_session.wait_response(0.0 if may_draft else SLICE_S)
        if response:
            return self._settle(response)
        if may_draft:
            self._draft(min(room, self._num_in_time()), trusts_exits=trusts_exits)
        return []

    def release(self) -> list[GeneratedToken]:
        """Continue without the cloud: withdraw the request and return the drafts as the device's
        own tokens. Drop the first draft that comes from prompt lookup, and all drafts after it.
        """
        self._cloud_session.withdraw()
        own = list(takewhile(lambda draft: draft.confidence is not None, self._drafts))
        if self._tracer and self._drafts:
            _trace_end(self._tracer, None, self._drafts, len(own))
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
        """The probability that the cloud accepts all drafts."""
        return prod(draft.chance for draft in self._drafts)

    def _pop_confident(self) -> list[GeneratedToken]:
        """Remove and return the leading run of confident drafts."""
        confident = _confident_run(self._drafts)
        del self._drafts[: len(confident)]
        return [draft.as_own() for draft in confident]

    def _may_draft(self) -> bool:
        if self._drafts and self._drafts[-1].token_id in self._eos_token_ids:
            return False
        if not self._num_asked:
            return True
        measured = self._measurements.snapshot()
        elapsed_s = time.monotonic() - self._asked_at
        wait_s = max(0.0, measured.round_trip_s - elapsed_s)
        return self._decoder.is_free and worth_guessing(self._survival, measured.step_s, wait_s)

    def _num_in_time(self) -> int:
        """Return how many positions a chunk may have now.

        Before the first verdict it is so short that it does not delay the first token.
        """
        if self._has_verdict:
            return self._max_draft
        wait_s = self._measurements.snapshot().round_trip_s - (time.monotonic() - self._asked_at)
        return self._measurements.positions_within(wait_s)

    def _is_worth_another(self) -> bool:
        measured = self._measurements.snapshot()
        return worth_drafting(self._survival, measured.step_s, measured.round_trip_s)

    def _draft(self, room: int, *, trusts_exits: bool) -> None:
        if trusts_exits or self._decoder.checks_proposals:
            prefers = never if trusts_exits else self._prefers_proposal
            choices = self._decoder.advance(room, prefers)
            drafts = [self._as_draft(choice, trusts_exits=trusts_exits) for choice in choices]
        else:
            drafts = self._draft_or_look_up(room)
        num_certain = 0
        if trusts_exits and not self._drafts:
            num_certain = len(_confident_run(drafts))
        self.num_drafted += len(drafts) - num_certain
        self._drafts += drafts

    def _draft_or_look_up(self, room: int) -> list[Draft]:
        """Return an exit's draft, or drafts from prompt lookup if these are better."""
        own = self._as_draft(self._decoder.choose(), trusts_exits=False)
        drafts = [own]
        if not own.is_confident and self._acceptance.lookup_probability > own.chance:
            drafts = self._look_up(min(room, MAX_LOOKUP)) or drafts
        if self._tracer and drafts[0] is not own:
            for number in range(len(drafts)):
                place = len(self._decoder.text) + number
                self._tracer.origin(place, TokenOrigin(is_proposed=True))
        self._decoder.text += [draft.token_id for draft in drafts]
        return drafts

    def _prefers_proposal(self, choice: ExitChoice) -> bool:
        """Return whether the cloud accepts the proposal more probably than the exit's choice."""
        if choice.proposal is None:
            return False
        chance = self._acceptance.proposal_probability(choice.proposal.chance)
        return chance > self._chance(choice.confidence)

    def _as_draft(self, choice: ExitChoice, *, trusts_exits: bool) -> Draft:
        """Return an exit's choice as a draft, or the proposal that is kept in its place."""
        if choice.proposal and choice.proposal.is_kept:
            return self._kept_draft(choice, choice.proposal)
        is_certain = trusts_exits and choice.is_confident
        return Draft(
            token_id=choice.token_id,
            logprob=choice.logprob,
            source=exit_source(choice.exit_layer),
            chance=1.0 if is_certain else self._chance(choice.confidence),
            confidence=choice.confidence,
            is_confident=choice.is_confident,
            top=choice.top,
            proposal=choice.proposal,
            emitted_token=_emitted_token(choice),
        )

    def _kept_draft(self, choice: ExitChoice, proposal: RejectedProposal) -> Draft:
        return Draft(
            token_id=proposal.token_id,
            logprob=0.0,
            source=LOOKUP,
            chance=self._acceptance.proposal_probability(proposal.chance),
            confidence=None,
            is_confident=False,
            proposal=proposal,
            emitted_token=_emitted_token(choice),
        )

    def _chance(self, confidence: float) -> float:
        """Return the probability that the cloud accepts an exit's draft in this answer."""
        expected = self._acceptance.probability(confidence)
        return min(MAX_CHANCE, self._memory.factor * expected)

    def _look_up(self, room: int) -> list[Draft]:
        """Return drafts from prompt lookup, if these are better than an exit's own one."""
        chance = self._acceptance.lookup_probability
        self._lookup.extend(self._decoder.text[len(self._lookup) :])
        proposed = self._lookup.propose(room)
        return [
            Draft(
                token_id=token_id,
                logprob=0.0,
                source=LOOKUP,
                chance=chance,
                confidence=None,
                is_confident=False,
            )
            for token_id in proposed[: self._decoder.num_allowed(proposed)]
        ]

    def _ask(self, *, trusts_exits: bool, wait_ms: int | None) -> None:
        drafts = self._drafts
        while trusts_exits and drafts[-1].is_confident:
            drafts = drafts[:-1]
        self._num_asked = len(drafts)
        self._asked_trusting = trusts_exits
        self._has_begun = True
        self._asked_at = time.monotonic()
        start = self._num_certain - 1
        self._decoder.upload(start + len(drafts))
        trusted = [i for i, draft in enumerate(drafts) if trusts_exits and draft.is_confident]
        token_ids = [draft.token_id for draft in drafts]
        self._cloud_session.ask(start, token_ids, trusted, wait_ms, is_optional=trusts_exits)

    def _settle(self, response: Verified) -> list[GeneratedToken]:
        """Return the tokens that the verdict makes certain."""
        asked = self._drafts[: self._num_asked]
        self._num_asked = 0
        self._has_verdict = True
        if self._tracer:
            self._trace_verdict(self._tracer, asked, response)
        tokens = []
        for i, draft in enumerate(asked[: response.accepted + 1]):
            is_accepted = i < response.accepted
            if self._asked_trusting and draft.is_confident:
                tokens.append(draft.as_own())
                continue
            self._learn(draft, draft.token_id if is_accepted else response.token_id)
            if is_accepted:
                source = CLOUD if self._asked_trusting else draft.source
                top = top_of(response, i)
                tokens.append(draft.as_token(response.logprobs[i], source, top))
        if response.token_id is None:
            del self._drafts[: len(asked)]
        else:
            self._rewind(self._num_certain + response.accepted)
            self._drafts = []
            self._decoder.text.append(response.token_id)
            top = top_of(response, response.accepted)
            tokens.append(GeneratedToken(response.token_id, response.logprobs[-1], CLOUD, top))
        return tokens

    def _trace_verdict(
        self, tracer: AnswerTracer, asked: Sequence[Draft], response: Verified
    ) -> None:
        """Record a verdict on drafts, before they become tokens."""
        for i, draft in enumerate(asked[: response.accepted + 1]):
            if not (self._asked_trusting and draft.is_confident):
                place = self._num_certain + i
                is_accepted = i < response.accepted
                tracer.judge(place, response.request, is_accepted=is_accepted)
        if response.token_id is None:
            _trace_end(tracer, response.request, self._drafts[: len(asked)], len(asked))
        else:  # it drops also what was drafted after the request
            _trace_end(tracer, response.request, self._drafts, response.accepted)

    def _learn(self, draft: Draft, token_id: int | None) -> None:
        """Count the cloud's token in the place of a draft."""
        is_accepted = token_id == draft.token_id
        if draft.proposal:
            is_chosen = token_id == draft.proposal.token_id
            self._acceptance.update_proposal(draft.proposal.chance, accepted=is_chosen)
        if draft.confidence is not None:
            expected = self._acceptance.probability(draft.confidence)
            self._memory.update(expected, is_right=is_accepted)
        if draft.confidence is not None or not draft.proposal:
            self._acceptance.update(draft.confidence, accepted=is_accepted)
        if not self._asked_trusting:
            # With trusted exits the cloud judges only drafts below the threshold. These verdicts do
            # not count in the measured `acceptance`, which is a share of all drafts.
            self._measurements.draft_judged(is_accepted=is_accepted)
        if draft.emitted_token is not None:
            self.num_judged += 1
            self.num_agreed += token_id == draft.emitted_token
        elif draft.confidence is not None:
            self._measurements.guess_judged(is_accepted=is_accepted)

    def _rewind(self, num_tokens: int) -> None:
        self._decoder.truncate(num_tokens)
        self._cloud_session.rewind(num_tokens)
        self._lookup.truncate(num_tokens)


def _trace_end(
    tracer: AnswerTracer, request: int | None, drafts: Sequence[Draft], num_kept: int
) -> None:
    """Record the end of drafts, of which the first `num_kept` become tokens."""
    token_ids = [draft.token_id for draft in drafts[num_kept:]]
    tracer.settle(request, len(drafts), num_kept, token_ids)


def _confident_run(drafts: Iterable[Draft]) -> list[Draft]:
    """Return the confident drafts at the beginning."""
    return list(takewhile(lambda draft: draft.is_confident, drafts))


def _emitted_token(choice: ExitChoice) -> int | None:
    """Return the token of a confident exit."""
    return choice.token_id if choice.is_confident else None


def top_of(response: Verified, index: int) -> TopTokens:
    """Return the worker's best tokens at a position of its verdict; none if it sent none."""
    top = () if response.top is UNSET else response.top
    return top[index] if index < len(top) else ()
