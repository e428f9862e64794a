"""One sequence on the device: its tokens, the exits' choices, and the hidden states to upload."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Final

from edge_agent.answer_tracer import AnswerTracer, TokenOrigin
from edge_agent.engine.fair_lock import FairLock, UserLock
from edge_agent.engine.prefix_tree import Prefix
from edge_agent.generation.proposal_budget import ProposalBudget
from edge_agent.generation.proposer import Proposer
from edge_agent.measurements import Measurements
from edge_agent.session.cloud_session import CloudSession
from fleet.constraints.token_constraint import Bool, TokenConstraint
from fleet.errors import ConstraintError
from fleet.exits.exit_policy import exit_emits
from fleet.exits.thresholds import OFF
from fleet.graphs.cascade import Cascade, ChunkContext
from fleet.graphs.partition import ExitCandidates, Partition
from fleet.protocol.choice_rules import LogitsOf, RankedTokens, rank_tokens, top_tokens
from fleet.protocol.messages import NO_RULES, ChoiceRules, Sampling, TopTokens
from fleet.protocol.sampling import draw

HEAD_ROWS: Final = 4
MAX_PROPOSALS: Final = 15  # a longer chunk loses more when an early guess is wrong
"""Positions of a chunk for which the LM head runs at once."""


@dataclass(frozen=True)
class RejectedProposal:
    """A proposal in whose place an exit chose another token; `chance` is that of its proposer.

    `is_kept` means that it is in the text nevertheless, as a draft for the cloud.
    """

    token_id: int
    chance: float
    is_kept: bool = False


@dataclass(frozen=True, kw_only=True)
class ExitChoice:
    """A token that an exit chose, and its log-probability at temperature 1, before the rules.

    `top` has the exit's best tokens, as many as the rules ask for.
    `is_confident` means that the exit emits the token: its confidence reaches the threshold, or it
    is the end of the whole model. `proposal` is one that the exit rejected.
    """

    token_id: int
    logprob: float
    exit_layer: int
    confidence: float
    is_confident: bool
    top: TopTokens = ()
    proposal: RejectedProposal | None = None


Prefers = Callable[[ExitChoice], bool]


@dataclass(frozen=True)
class GeneratedToken:
    """A token of the answer, its source, and its log-probability at temperature 1.

    The log-probability is the cloud's if the cloud chose or accepted the token, else the exit's. So
    are the best tokens, `top`. `confidence` is that of the exit which chose the token, if an exit
    did.
    """

    token_id: int
    logprob: float
    source: str
    top: TopTokens = ()
    confidence: float | None = None


def never(choice: ExitChoice) -> bool:
    """Prefer no proposal to the choice of an exit."""
    del choice
    return False


def proceed() -> None:
    """Let every chunk of a sequence run."""


class Decoder:
    """A sequence that runs through the cascade.

    Decoders that share `lock` run one chunk of a block at a time. `check` is called before each
    chunk, because a long prompt takes a while. It may raise an error to end the sequence.

    `text` holds all tokens, also those that have not run yet. The outputs of the block that ends at
    the upload layer are offered to `cloud_session`, each position once. From the position
    `one_by_one_from` on, all results have the same bits as without drafts (see :class:`Cascade`).

    `proposer` guesses tokens, which run as one chunk with the newest position, so that a step may
    give several tokens. They are those of single steps (docs/adr/0052). Nothing is guessed after
    one of the `eos_token_ids`. `num_steps` counts the steps that gave tokens.
    """

    def __init__(
        self,
        partition: Partition,
        capacity: int,
        thresholds: Sequence[float],
        sampling: Sampling,
        cloud_session: CloudSession | None = None,
        lock: UserLock | None = None,
        measurements: Measurements | None = None,
        *,
        one_by_one_from: int | None = None,
        rules: ChoiceRules = NO_RULES,
        constraint: TokenConstraint | None = None,
        proposer: Proposer | None = None,
        eos_token_ids: Collection[int] = (),
        tracer: AnswerTracer | None = None,
    ) -> None:
        self.cascade = Cascade(partition, capacity, one_by_one_from)
        self.text: list[int] = []
        self.check: Callable[[], None] = proceed
        self._exits = partition.exits
        self._is_whole = partition.is_whole
        self._upload_block = self._exits.index(partition.upload_layer)
        self._thresholds = thresholds
        self._sampling = sampling
        self._rules = rules
        self._constraint = constraint
        self._cloud_session = cloud_session
        self._lock = lock or FairLock().of("")
        self._measurements = measurements or Measurements()
        self._num_offered = 0
        self._run_s = 0.0  # without the waits for other sequences
        self._proposer = proposer if partition.has_all_exits and one_by_one_from is None else None
        self._eos_token_ids = eos_token_ids
        self._budget = ProposalBudget()
        self.num_steps = 0
        self._tracer = tracer

    @property
    def checks_proposals(self) -> bool:
        """Whether a step may give several tokens."""
        return self._proposer is not None

    @property
    def is_free(self) -> bool:
        """Whether no other sequence runs the model."""
        return self._lock.is_free

    def begin(self, prefix: Prefix) -> None:
        """Begin with tokens of the prompt that have run in an earlier answer."""
        self.cascade.load(prefix.token_ids.tolist(), prefix.blocks)

    def advance(self, max_tokens: int, prefers: Prefers = never) -> list[ExitChoice]:
        """Append the next tokens to the text, at least one and at most `max_tokens`; return them.

        They are what :meth:`choose` would give one after the other. But a rejected proposal that
        the caller `prefers` to the exit's choice stays in the text, and what follows it, too.
        """
        proposals = self._propose(min(max_tokens - 1, MAX_PROPOSALS))
        choices = self._choose_run(proposals, prefers)
        if proposals and self._proposer:
            self._proposer.learn(len(proposals), _num_chosen(choices, proposals))
        cost = self._measurements.chunk_cost(len(proposals) + 1)
        self._budget.count(len(choices), cost / self._measurements.chunk_cost(1))
        self.text += map(_text_token, choices)
        return choices

    def choose(self) -> ExitChoice:
        """Return the token after the newest position, from the first confident exit or, if there is
        none, from the deepest exit.
        """
        return self._choose_run((), never)[0]

    def _propose(self, max_tokens: int) -> list[int]:
        """Return proposals for the tokens after the text; none before the prompt has run."""
        proposer = self._proposer
        is_step = self.cascade.num_filled(0) >= len(self.text) - 1
        if proposer is None or max_tokens < 1 or not is_step or self._budget.is_spent:
            return []
        proposer.extend(self.text[len(proposer) :])
        guesses = proposer.propose(max_tokens)
        proposals = list(takewhile(lambda token_id: token_id not in self._eos_token_ids, guesses))
        return proposals[: self.num_allowed(proposals)] if proposals else []

    def _choose_run(self, proposals: Sequence[int], prefers: Prefers) -> list[ExitChoice]:
        """Return the tokens after the newest position: those that agree with `proposals`, and the
        first one that does not, or that follows them all.
        """
        self._append(len(self.text))
        start = self.cascade.num_tokens - 1
        started = time.monotonic()
        run_s = self._run_s
        if self.cascade.num_filled(0) > start:
            # An exit's candidates belong to a position that ran last, which may have been dropped
            # since. So run the newest position again.
            self.cascade.truncate(start)
            self.cascade.append(self.text[start:])
        is_step = start == self.cascade.num_filled(0)
        num_filled = self.cascade.num_filled(0)
        self.cascade.append(proposals)
        choices: list[ExitChoice] = []
        text = [*self.text, *proposals] if proposals else self.text
        exits = ChunkExits(partial(self._fill, text), self.cascade, self._locked)
        for number, token_id in enumerate([*proposals, None]):
            position = start + number
            choice = self._choose_at(position, text[: position + 1], exits)
            if token_id not in (None, choice.token_id):
                choice = self._with_proposal(choice, number, token_id, prefers)
            choices.append(choice)
            if _text_token(choice) != token_id:
                break
        self.cascade.truncate(start + len(choices))
        self._offer(self._upload_block, text)
        if is_step:  # not for a prompt, which takes longer than one token
            self._measurements.step_done((time.monotonic() - started) / len(choices))
            self._measurements.chunk_done(len(proposals) + 1, self._run_s - run_s)
        self.num_steps += 1
        if self._tracer:
            num_run = self.cascade.num_filled(0) - num_filled
            self._trace(self._tracer, started, num_run, proposals, choices)
        return choices

    def _trace(
        self,
        tracer: AnswerTracer,
        started: float,
        num_run: int,
        proposals: Sequence[int],
        choices: Sequence[ExitChoice],
    ) -> None:
        """Record a step and the origins of the tokens that it gives."""
        kept = 0
        for number, choice in enumerate(choices):
            is_proposed = number < len(proposals) and _text_token(choice) == proposals[number]
            kept += is_proposed
            is_replaced = choice.proposal is not None and choice.proposal.is_kept
            layer = None if is_replaced else choice.exit_layer
            origin = TokenOrigin(exit_layer=layer, is_proposed=is_proposed)
            tracer.origin(len(self.text) + number, origin)
        tracer.step(started, num_run, proposed=len(proposals), kept=kept)

    def _with_proposal(
        self, choice: ExitChoice, number: int, token_id: int, prefers: Prefers
    ) -> ExitChoice:
        """Return a choice with the proposal that it rejects, which is kept if it is preferred."""
        chance = self._proposer.chance(number) if self._proposer else 0.0
        proposal = RejectedProposal(token_id, chance)
        choice = replace(choice, proposal=proposal)
        return replace(choice, proposal=replace(proposal, is_kept=prefers(choice)))

    def _choose_at(self, position: int, text: Sequence[int], exits: ChunkExits) -> ExitChoice:
        """Return the token after `text`, whose last position is `position`."""
        allowed = self._allowed(text)
        for block, threshold in enumerate(self._thresholds):
            is_last = block == len(self._exits) - 1
            if threshold == OFF and not is_last:
                continue
            candidates = exits.at(block, position)
            logits_of = partial(self.cascade.logits_of, block, position)
            ranked = self._rank(candidates, text, logits_of, allowed)
            is_exact = is_last and self._is_whole
            is_confident = is_exact or exit_emits(ranked.confidence, threshold)
            if is_confident:
                break
        self._measurements.token_chosen(ranked.confidence, is_emitted=is_confident)
        chosen = draw(ranked.scores, ranked.token_ids, position, self._sampling, self._rules.min_p)
        return ExitChoice(
            token_id=int(ranked.token_ids[chosen]),
            logprob=float(ranked.logprobs[chosen]),
            exit_layer=self._exits[block],
            confidence=ranked.confidence,
            is_confident=is_confident,
            top=top_tokens(candidates.token_ids, candidates.logprobs, self._rules.top_logprobs),
        )

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        """Return how many of these tokens may follow the text, before one is forbidden."""
        constraint = self._constraint
        return constraint.num_allowed(self.text, token_ids) if constraint else len(token_ids)

    def _fill(self, text: Sequence[int], block: int, num_last: int) -> None:
        """Run the blocks up to `block` over `text`; the last `num_last` positions are part of one
        chunk.
        """
        for i in range(block + 1):
            self.cascade.fill(i, self._locked, num_last)
            if num_last == 1:  # else the outputs have proposals that may be wrong
                self._offer(i, text)

    def _allowed(self, text: Sequence[int]) -> Bool | None:
        """Return which tokens [vocab] may follow `text`; None without a constraint."""
        if self._constraint is None:
            return None
        allowed = self._constraint.allowed(text)
        if allowed is None:
            raise ConstraintError(
                "the worker chose a token that the constraint of this answer forbids; "
                "use the same version of llguidance on both sides"
            )
        return allowed

    def _rank(
        self,
        candidates: ExitCandidates,
        text: Sequence[int],
        logits_of: LogitsOf,
        allowed: Bool | None,
    ) -> RankedTokens:
        """Return an exit's candidates for the token after `text`, after the rules."""
        token_ids = candidates.token_ids
        logprobs = candidates.logprobs
        if not self._rules.change_logits:
            return RankedTokens(token_ids, logprobs, logprobs, candidates.confidence)
        return rank_tokens(token_ids, logprobs, self._rules, text, logits_of, allowed)

    def upload(self, num_positions: int) -> None:
        """Upload positions [0, num_positions); first run the blocks that early exits skipped."""
        started = time.monotonic()
        run_s = self._run_s
        self._append(num_positions)
        for block in range(self._upload_block + 1):
            self.cascade.fill(block, self._locked)
        self._offer(self._upload_block, self.text)
        if self._tracer and self._run_s > run_s:
            self._tracer.step(started, 0)

    def truncate(self, num_tokens: int) -> None:
        """Drop every token from `num_tokens` on. The caller has to rewind the cloud session."""
        del self.text[num_tokens:]
        self.cascade.truncate(num_tokens)
        if self._proposer:
            self._proposer.truncate(num_tokens)
        self._num_offered = min(self._num_offered, num_tokens)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.check()
        with self._lock:
            started = time.monotonic()
            yield
            self._run_s += time.monotonic() - started

    def _append(self, num_tokens: int) -> None:
        """Append tokens of the text to the cascade, until it has the first `num_tokens`."""
        self.cascade.append(self.text[self.cascade.num_tokens : num_tokens])

    def _offer(self, block: int, text: Sequence[int]) -> None:
        """Offer the outputs of `block`, whose tokens `text` has, that were not offered yet."""
        if self._cloud_session and block == self._upload_block:
            hidden_states = self.cascade.hidden_states(block, self._num_offered)
            stop = self._num_offered + len(hidden_states)
            self._cloud_session.offer(hidden_states, list(text[self._num_offered : stop]))
            self._num_offered = stop


def _text_token(choice: ExitChoice) -> int:
    """Return the token that a choice adds to the text."""
    proposal = choice.proposal
    return proposal.token_id if proposal and proposal.is_kept else choice.token_id


def _num_chosen(choices: Sequence[ExitChoice], proposals: Sequence[int]) -> int:
    """Return how many of the proposals the exits chose, before the first that they did not."""
    pairs = zip(choices, proposals, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0].token_id == pair[1], pairs))


class ChunkExits:
    """The exits' candidates for positions of one chunk, computed when they are needed.

    Wrong proposals cost no LM head but those of the next few positions. `fill` runs the blocks up
    to one.
    """

    def __init__(
        self, fill: Callable[[int, int], None], cascade: Cascade, context: ChunkContext
    ) -> None:
        self._fill = fill
        self._cascade = cascade
        self._context = context
        self._known: dict[tuple[int, int], ExitCandidates] = {}

    def at(self, block: int, position: int) -> ExitCandidates:
        """Return the candidates of a block's exit at a position; ask in ascending order."""
        if (block, position) not in self._known:
            num_tokens = self._cascade.num_tokens
            self._fill(block, num_tokens - position)
            stop = min(position + HEAD_ROWS, num_tokens)
            with self._context():
                found = self._cascade.exits(block, position, stop)
            places = [(block, i) for i in range(position, stop)]
            self._known |= dict(zip(places, found, strict=True))
        return self._known[block, position]
