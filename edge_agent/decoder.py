"""One sequence on the device: its tokens, what the exits say of the next one, and what goes up to the cloud."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from edge_agent.cascade import Cascade
from edge_agent.measurements import Measurements
from edge_agent.partition import Partition
from edge_agent.turns import Turns
from edge_agent.uplink import Uplink
from fleet.messages import Sampling
from fleet.policy import exit_emits
from fleet.sampling import draw


@dataclass(frozen=True)
class Choice:
    """A token that an exit chose, its log-probability at temperature 1, and whether the exit is sure enough to emit."""

    token_id: int
    logprob: float
    exit_layer: int
    confidence: float
    is_sure: bool


class Guess(NamedTuple):
    """A token that may come next, and what the exits say if it does."""

    token_id: int
    choice: Choice


@dataclass(frozen=True)
class GeneratedToken:
    """A token of the answer, its log-probability at temperature 1 where it was chosen, and where that was."""

    token_id: int
    logprob: float
    source: str


class Decoder:
    """Runs a sequence through the cascade. Decoders that share `turns` run one chunk of a block at a time.

    `text` are all tokens; those that nothing has needed yet have not run, and guesses may have run that are none of
    them. The outputs of the block that ends at the upload layer are offered to `uplink`, each position of the text
    once. With `one_by_one_from` every position from there on has the very bits that it has where nothing is drafted
    (see :class:`Cascade`).
    """

    def __init__(
        self,
        partition: Partition,
        capacity: int,
        thresholds: Sequence[float],
        sampling: Sampling,
        uplink: Uplink | None = None,
        turns: Turns | None = None,
        measurements: Measurements | None = None,
        *,
        one_by_one_from: int | None = None,
    ) -> None:
        self.cascade = Cascade(partition, capacity, one_by_one_from)
        self.text: list[int] = []
        self._manifest = partition.manifest
        self._upload_block = self._manifest.exits.index(self._manifest.upload_layer)
        self._thresholds = thresholds
        self._sampling = sampling
        self._uplink = uplink
        self._turns = turns or Turns()
        self._measurements = measurements or Measurements()
        self._num_offered = 0
        self._guesses: list[Guess] = []  # the cascade's last tokens, behind those of the text
        self._guessed: Choice | None = None  # the one after the text's newest token, where that was guessed

    @property
    def can_guess(self) -> bool:
        """Whether another token has room, and nobody else is at the model."""
        return self.cascade.num_tokens < self.cascade.capacity and self._turns.is_free

    def choose(self) -> Choice:
        """The token after the newest position: by the first exit that is sure, else by the deepest."""
        self._append(len(self.text))
        choice, self._guessed = self._guessed, None
        if choice is None:
            self._forget_guesses()
            choice = self._run()
        self._offer(self._upload_block)
        self._measurements.chose(choice.confidence, is_sure=choice.is_sure)
        return choice

    def guess(self, token_id: int) -> Choice:
        """What :meth:`choose` will say should `token_id` be the next token of the text, behind the guesses so far.

        The text stays as it is, and none of it goes up. Guesses that come true need not run again; the others are
        forgotten when the text goes on.
        """
        self.cascade.append([token_id])
        choice = self._run()
        self._guesses.append(Guess(token_id, choice))
        return choice

    def _run(self) -> Choice:
        """The choice after the cascade's newest token."""
        position, started = self.cascade.num_tokens - 1, time.monotonic()
        if self.cascade.num_filled(0) > position:  # an exit speaks of what ran last, and that may have been cut off
            token_id = self.text[position]
            self.cascade.truncate(position)
            self.cascade.append([token_id])
        is_step = position == self.cascade.num_filled(0)
        for block, threshold in enumerate(self._thresholds):
            candidates = self.cascade.run(block, self._turns)
            self._offer(block)
            if is_sure := exit_emits(candidates.confidence, threshold):
                break
        if is_step:  # a prompt says little of how long a token takes
            self._measurements.step(time.monotonic() - started)
        chosen = draw(candidates.logprobs, candidates.token_ids, position, self._sampling)
        return Choice(
            int(candidates.token_ids[chosen]), float(candidates.logprobs[chosen]), self._manifest.exits[block],
            candidates.confidence, is_sure,
        )  # fmt: skip

    def upload(self, num_positions: int) -> None:
        """Puts positions [0, num_positions) on their way up: runs what exits have left undone of them."""
        self._append(num_positions)
        for block in range(self._upload_block + 1):
            self.cascade.fill(block, self._turns)
        self._offer(self._upload_block)

    def truncate(self, num_tokens: int) -> None:
        """Forgets every token from `num_tokens` on, here; the uplink is rewound by whoever knows why."""
        del self.text[num_tokens:]
        self._forget_guesses()
        self.cascade.truncate(num_tokens)
        self._num_offered = min(self._num_offered, num_tokens)

    def _append(self, num_tokens: int) -> None:
        """Gives the cascade the text's first `num_tokens` tokens: what was guessed right stays, the rest is cut off."""
        start = self.cascade.num_tokens - len(self._guesses)
        new = self.text[start:num_tokens]
        if not new:
            return
        pairs = takewhile(lambda pair: pair[0].token_id == pair[1], zip(self._guesses, new, strict=False))
        num_right = sum(1 for _ in pairs)
        if num_right == len(new):
            self._guessed = self._guesses[num_right - 1].choice
            del self._guesses[:num_right]
            return
        del self._guesses[:num_right]
        self._forget_guesses()
        self.cascade.append(new[num_right:])

    def _forget_guesses(self) -> None:
        self.cascade.truncate(self.cascade.num_tokens - len(self._guesses))
        self._guesses, self._guessed = [], None

    def _offer(self, block: int) -> None:
        """Offers what `block` has run of the text and not offered yet."""
        if self._uplink and block == self._upload_block:
            num_new = max(0, len(self.text) - self._num_offered)
            hidden_states = self.cascade.hidden_states(block, self._num_offered)[:num_new]
            self._uplink.offer(hidden_states)
            self._num_offered += len(hidden_states)
