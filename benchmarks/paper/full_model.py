"""The deployed full model in one process, as a judge of given texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cloud_broker_worker.worker.upper_layers import Chunk, UpperLayers
from fleet.bundles.manifest import Bundle
from fleet.graphs.cascade import Cascade
from fleet.graphs.partition import ExitCandidates, Partition


class FullModelVerdict(NamedTuple):
    """The full model's verdict on an answer. Each token is judged after the earlier ones.

    `nll` is the mean negative log-likelihood, `agreement` the share of tokens that are its own
    choice, and `gap` the maximum by which a logit exceeds that of the answer's token: a gap near 0
    is a tie, which rounding decides.
    """

    nll: float
    agreement: float
    gap: float


class FullModel:
    """Both halves of a bundle: the device's blocks, FP16 between them, and the cloud's layers."""

    def __init__(self, bundle: Bundle, num_threads: int) -> None:
        """Load a bundle; raise BundleError when it does not load."""
        self.partition = Partition(bundle, num_threads)
        self.upper = UpperLayers(bundle, num_threads)

    def read(self, prompt_ids: Sequence[int], max_tokens: int) -> Reading:
        """Run a prompt. Answers to it of at most `max_tokens` tokens can then be judged."""
        return Reading(self, prompt_ids, max_tokens)


class Reading:
    """A prompt that the full model has run.

    `exits` are the exits' predictions of the next token, `logits` [vocab] the full model's.
    """

    def __init__(self, model: FullModel, prompt_ids: Sequence[int], max_tokens: int) -> None:
        """Load a bundle; raise BundleError when it does not load."""
        manifest = model.partition.manifest
        self._upper = model.upper
        self._block = manifest.exits.index(manifest.upload_layer)
        self._num_prompt = len(prompt_ids)
        capacity = len(prompt_ids) + max_tokens
        self._lease = model.upper.new_pool(1 << 40).lease(capacity)
        self._cascade = Cascade(
            model.partition, capacity, one_by_one_from=self._num_prompt
        )  # as on a device
        self._cascade.append(prompt_ids)
        self.exits: list[ExitCandidates] = [
            self._cascade.run(block) for block in range(len(manifest.exits))
        ]
        self.logits: Tensor = self._run(0, self._num_prompt, 1)[0]

    def _run(self, start: int, stop: int, num_outputs: int) -> Tensor:
        rows = self._cascade.hidden_states(self._block, start)[: stop - start].astype(np.float16)
        return self._upper([Chunk(self._lease, rows, start, stop, range(stop - num_outputs, stop))])

    def judge(self, token_ids: Sequence[int]) -> FullModelVerdict:
        """Return the verdict on an answer of at least one token."""
        logits = self.logits_along(token_ids)
        targets = torch.tensor(token_ids)[:, None]
        own = logits.gather(1, targets)
        nll = -logits.log_softmax(-1).gather(1, targets).mean()
        gaps = logits.max(-1, keepdim=True).values - own
        agreement = (logits.argmax(-1, keepdim=True) == targets).float().mean()
        return FullModelVerdict(float(nll), float(agreement), float(gaps.max()))

    def logits_along(self, token_ids: Sequence[int]) -> Tensor:
        """Return logits [n, vocab] for each of n tokens, given the earlier ones."""
        start = self._num_prompt
        count = len(token_ids) - 1
        if not count:
            return self.logits[None]
        self._cascade.truncate(start)
        self._cascade.append(token_ids[:-1])
        for block in range(self._block + 1):
            self._cascade.fill(block)
        return torch.cat([self.logits[None], self._run(start, start + count, count)])
