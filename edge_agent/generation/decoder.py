"""One sequence on the device: its tokens, what the exits say of the next one, and what goes up to the cloud."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from edge_agent.engine.cascade import Cascade
from edge_agent.engine.fair_lock import FairLock
from edge_agent.engine.partition import Partition
from edge_agent.measurements import Measurements
from edge_agent.session.cloud_session import CloudSession
from fleet.exits.exit_policy import exit_emits
from fleet.protocol.messages import Sampling
from fleet.protocol.sampling import draw


@dataclass(frozen=True, kw_only=True)
class ExitChoice:
    """A token that an exit chose, its log-probability at temperature 1, and whether the exit is sure enough to emit."""

    token_id: int
    logprob: float
    exit_layer: int
    confidence: float
    is_sure: bool


@dataclass(frozen=True)
class GeneratedToken:
    """A token of the answer, its log-probability at temperature 1 where it was chosen, and where that was."""

    token_id: int
    logprob: float
    source: str


class Decoder:
    """Runs a sequence through the cascade. Decoders that share `turns` run one chunk of a block at a time.

    `check` is called before each chunk, and may raise what ends the sequence: a long prompt takes a while.

    `text` are all tokens; those that nothing has needed yet have not run. The outputs of the block that ends at the
    upload layer are offered to `uplink`, each position once. With `one_by_one_from` every position from there on has
    the very bits that it has where nothing is drafted (see :class:`Cascade`).
    """

    def __init__(
        self,
        partition: Partition,
        capacity: int,
        thresholds: Sequence[float],
        sampling: Sampling,
        uplink: CloudSession | None = None,
        turns: FairLock | None = None,
        measurements: Measurements | None = None,
        *,
        one_by_one_from: int | None = None,
    ) -> None:
        self.cascade = Cascade(partition, capacity, one_by_one_from)
        self.text: list[int] = []
        self.check: Callable[[], None] = lambda: None
        self._manifest = partition.manifest
        self._upload_block = self._manifest.exits.index(self._manifest.upload_layer)
        self._thresholds = thresholds
        self._sampling = sampling
        self._uplink = uplink
        self._turns = turns or FairLock()
        self._measurements = measurements or Measurements()
        self._num_offered = 0

    @property
    def is_free(self) -> bool:
        """Whether nobody else is at the model."""
        return self._turns.is_free

    def choose(self) -> ExitChoice:
        """The token after the newest position: by the first exit that is sure, else by the deepest."""
        self._append(len(self.text))
        position = self.cascade.num_tokens - 1
        started = time.monotonic()
        if (
            self.cascade.num_filled(0) > position
        ):  # an exit speaks of what ran last, and that may have been cut off
            self.cascade.truncate(position)
            self.cascade.append(self.text[position:])
        is_step = position == self.cascade.num_filled(0)
        for block, threshold in enumerate(self._thresholds):
            candidates = self.cascade.run(block, self._turn)
            self._offer(block)
            if is_sure := exit_emits(candidates.confidence, threshold):
                break
        if is_step:  # a prompt says little of how long a token takes
            self._measurements.step(time.monotonic() - started)
        self._measurements.chose(candidates.confidence, is_sure=is_sure)
        chosen = draw(candidates.logprobs, candidates.token_ids, position, self._sampling)
        return ExitChoice(
            token_id=int(candidates.token_ids[chosen]),
            logprob=float(candidates.logprobs[chosen]),
            exit_layer=self._manifest.exits[block],
            confidence=candidates.confidence,
            is_sure=is_sure,
        )

    def upload(self, num_positions: int) -> None:
        """Puts positions [0, num_positions) on their way up: runs what exits have left undone of them."""
        self._append(num_positions)
        for block in range(self._upload_block + 1):
            self.cascade.fill(block, self._turn)
        self._offer(self._upload_block)

    def truncate(self, num_tokens: int) -> None:
        """Forgets every token from `num_tokens` on, here; the uplink is rewound by whoever knows why."""
        del self.text[num_tokens:]
        self.cascade.truncate(num_tokens)
        self._num_offered = min(self._num_offered, num_tokens)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        self.check()
        with self._turns:
            yield

    def _append(self, num_tokens: int) -> None:
        """Gives the cascade the text's first `num_tokens` tokens."""
        self.cascade.append(self.text[self.cascade.num_tokens : num_tokens])

    def _offer(self, block: int) -> None:
        """Offers what `block` has run and not offered yet."""
        if self._uplink and block == self._upload_block:
            hidden_states = self.cascade.hidden_states(block, self._num_offered)
            self._uplink.offer(hidden_states)
            self._num_offered += len(hidden_states)
