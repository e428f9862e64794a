"""One sequence on the device: its tokens, the exits' choices, and the hidden states to upload."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from edge_agent.engine.cascade import Cascade
from edge_agent.engine.fair_lock import FairLock, UserLock
from edge_agent.engine.partition import ExitCandidates, Partition
from edge_agent.engine.prefix_tree import Prefix
from edge_agent.measurements import Measurements
from edge_agent.session.cloud_session import CloudSession
from fleet.constraints.token_constraint import Bool, TokenConstraint
from fleet.errors import ConstraintError
from fleet.exits.exit_policy import exit_emits
from fleet.exits.thresholds import OFF
from fleet.protocol.choice_rules import LogitsOf, RankedTokens, rank_tokens, top_tokens
from fleet.protocol.messages import NO_RULES, ChoiceRules, Sampling, TopTokens
from fleet.protocol.sampling import draw


@dataclass(frozen=True, kw_only=True)
class ExitChoice:
    """A token that an exit chose, and its log-probability at temperature 1, before the rules.

    `top` has the exit's best tokens, as many as the rules ask for.
    `is_confident` means that the exit emits the token: its confidence reaches the threshold, or it
    is the end of the whole model.
    """

    token_id: int
    logprob: float
    exit_layer: int
    confidence: float
    is_confident: bool
    top: TopTokens = ()


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


def proceed() -> None:
    """Let every chunk of a sequence run."""


class Decoder:
    """A sequence that runs through the cascade.

    Decoders that share `lock` run one chunk of a block at a time. `check` is called before each
    chunk, because a long prompt takes a while. It may raise an error to end the sequence.

    `text` holds all tokens, also those that have not run yet. The outputs of the block that ends at
    the upload layer are offered to `cloud_session`, each position once. From the position
    `one_by_one_from` on, all results have the same bits as without drafts (see :class:`Cascade`).
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

    @property
    def is_free(self) -> bool:
        """Whether no other sequence runs the model."""
        return self._lock.is_free

    def begin(self, prefix: Prefix) -> None:
        """Begin with tokens of the prompt that have run in an earlier answer."""
        self.cascade.load(prefix.token_ids.tolist(), prefix.blocks)

    def choose(self) -> ExitChoice:
        """Return the token after the newest position, from the first confident exit or, if there is
        none, from the deepest exit.
        """
        self._append(len(self.text))
        position = self.cascade.num_tokens - 1
        started = time.monotonic()
        if self.cascade.num_filled(0) > position:
            # An exit's candidates belong to the position that ran last, which may have been dropped
            # since. So run the newest position again.
            self.cascade.truncate(position)
            self.cascade.append(self.text[position:])
        is_step = position == self.cascade.num_filled(0)
        allowed = self._allowed()
        for block, threshold in enumerate(self._thresholds):
            is_last = block == len(self._exits) - 1
            if threshold == OFF and not is_last:
                self.cascade.fill(block, self._locked)
                self._offer(block)
                continue
            candidates = self.cascade.run(block, self._locked)
            logits_of = partial(self.cascade.logits_of, block, position)
            ranked = self._rank(candidates, logits_of, allowed)
            self._offer(block)
            is_exact = is_last and self._is_whole
            is_confident = is_exact or exit_emits(ranked.confidence, threshold)
            if is_confident:
                break
        if is_step:  # not for a prompt, which takes longer than one token
            self._measurements.step_done(time.monotonic() - started)
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

    def _allowed(self) -> Bool | None:
        """Return which tokens [vocab] may follow the text; None without a constraint."""
        if self._constraint is None:
            return None
        allowed = self._constraint.allowed(self.text)
        if allowed is None:
            raise ConstraintError(
                "the worker chose a token that the constraint of this answer forbids; "
                "use the same version of llguidance on both sides"
            )
        return allowed

    def _rank(
        self, candidates: ExitCandidates, logits_of: LogitsOf, allowed: Bool | None
    ) -> RankedTokens:
        """Return an exit's candidates for the next token after the rules."""
        token_ids = candidates.token_ids
        logprobs = candidates.logprobs
        if not self._rules.change_logits:
            return RankedTokens(token_ids, logprobs, logprobs, candidates.confidence)
        return rank_tokens(token_ids, logprobs, self._rules, self.text, logits_of, allowed)

    def upload(self, num_positions: int) -> None:
        """Upload positions [0, num_positions); first run the blocks that early exits skipped."""
        self._append(num_positions)
        for block in range(self._upload_block + 1):
            self.cascade.fill(block, self._locked)
        self._offer(self._upload_block)

    def truncate(self, num_tokens: int) -> None:
        """Drop every token from `num_tokens` on. The caller has to rewind the cloud session."""
        del self.text[num_tokens:]
        self.cascade.truncate(num_tokens)
        self._num_offered = min(self._num_offered, num_tokens)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.check()
        with self._lock:
            yield

    def _append(self, num_tokens: int) -> None:
        """Append tokens of the text to the cascade, until it has the first `num_tokens`."""
        self.cascade.append(self.text[self.cascade.num_tokens : num_tokens])

    def _offer(self, block: int) -> None:
        """Offer the outputs of `block` that have not been offered yet."""
        if self._cloud_session and block == self._upload_block:
            hidden_states = self.cascade.hidden_states(block, self._num_offered)
            stop = self._num_offered + len(hidden_states)
            self._cloud_session.offer(hidden_states, self.text[self._num_offered : stop])
            self._num_offered = stop
