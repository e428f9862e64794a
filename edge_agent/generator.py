"""One answer, token by token: exits first, then the cloud, then the deepest exit alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edge_agent.cascade import Cascade
from edge_agent.partition import Candidates, Partition
from edge_agent.turns import Turns
from edge_agent.uplink import Uplink
from fleet.messages import Sampling
from fleet.policy import CLOUD, FALLBACK, exit_emits, exit_source
from fleet.sampling import draw


@dataclass(frozen=True)
class GeneratedToken:
    """A token, its log-probability at temperature 1 where it was chosen, and where that was."""

    token_id: int
    logprob: float
    source: str


class Generator:
    """Generates one sequence. `uplink` None is standalone: the deepest exit then always emits.

    Generators that share `turns` run one chunk of a block at a time between them, each with all threads.
    """

    def __init__(
        self,
        partition: Partition,
        capacity: int,
        thresholds: Sequence[float],
        sampling: Sampling,
        uplink: Uplink | None = None,
        *,
        ask_cloud: bool = False,
        turns: Turns | None = None,
    ) -> None:
        self.cascade = Cascade(partition, capacity)
        self._manifest = partition.manifest
        self._thresholds = thresholds
        self._sampling = sampling
        self._uplink = uplink
        self._ask_cloud = ask_cloud
        self._turns = turns or Turns()
        self._offered = 0

    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int) -> Iterator[GeneratedToken]:
        """Up to `max_new_tokens` tokens; the last one may be an end-of-sequence token."""
        self.cascade.append(prompt_ids)
        for _ in range(max_new_tokens):
            token = self._next_token()
            yield token
            if token.token_id in self._manifest.model.eos_token_ids:
                return
            self.cascade.append([token.token_id])

    def _next_token(self) -> GeneratedToken:
        position = self.cascade.num_tokens - 1
        for block, (exit_layer, threshold) in enumerate(zip(self._manifest.exits, self._thresholds, strict=True)):
            candidates = self.cascade.run(block, self._turns)
            if self._uplink and exit_layer == self._manifest.upload_layer:
                self._uplink.offer(self.cascade.hidden_states(block, self._offered))
                self._offered = self.cascade.num_filled(block)
            if exit_emits(candidates.confidence, threshold):
                return self._draw(candidates, position, exit_source(exit_layer))
        answer = self._uplink.assist(position) if self._uplink else None
        if answer:
            return GeneratedToken(answer.token_id, answer.logprob, CLOUD)
        return self._draw(
            candidates, position, FALLBACK if self._ask_cloud else exit_source(self._manifest.split_layer)
        )

    def _draw(self, candidates: Candidates, position: int, source: str) -> GeneratedToken:
        chosen = draw(candidates.logprobs, position, self._sampling)
        return GeneratedToken(int(candidates.token_ids[chosen]), float(candidates.logprobs[chosen]), source)
