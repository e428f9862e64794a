"""Records of every exit along the full model's answers, made with a bundle as deployed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from fleet.bundles.manifest import Bundle, Manifest
from fleet.errors import ConfigError
from fleet.exits.records import Records
from fleet.protocol.hidden_states import Float16
from fleet.protocol.prompt import PromptRequest
from fleet.utils.optional_imports import needs

with needs("edge"):
    from edge_agent.engine.tokenizer import ChatTokenizer
    from fleet.graphs.cascade import Cascade
    from fleet.graphs.partition import ExitCandidates, Partition
with needs("worker"):
    from cloud_broker_worker.worker.upper_layers import Chunk, UpperLayers

if TYPE_CHECKING:
    from cloud_broker_worker.worker.kv_pool import KvLease

MAX_BATCH: Final = 32  # answers at once: the cloud part runs them as one ragged batch
FLOAT32_BYTES: Final = 4
NUM_COPIES: Final = 2  # of a half: mapped from its file, and packed or converted for its kernels
POOL_BYTES: Final = 1 << 40  # never reached: there are at most `MAX_BATCH` leases


class ExitRow(NamedTuple):
    """The exits at one position of an answer: their confidence, and whether they agree."""

    answer: int
    confidence: list[float]
    agrees: list[bool]


@dataclass(kw_only=True)
class RecordedAnswer:
    """An answer that is being generated: the device's cascade and the worker's cache.

    `pending` are the tokens that no block has run yet.
    """

    number: int
    cascade: Cascade
    lease: KvLease
    pending: Sequence[int]
    num_generated: int = 0

    def run_exits(self, block: int, num_exits: int) -> tuple[list[ExitCandidates], Float16]:
        """Run all blocks over the pending tokens.

        Return the candidates of each exit, and the hidden states [n, hidden] that a device would
        upload, which are the outputs of `block`.
        """
        start = self.cascade.num_filled(block)
        self.cascade.append(self.pending)
        candidates = [self.cascade.run(i) for i in range(num_exits)]
        return candidates, self.cascade.hidden_states(block, start).astype(np.float16)


class ExitRecorder:
    """Both parts of a bundle in this process: graphs in ONNX Runtime, upper layers in PyTorch."""

    def __init__(
        self, bundle: Bundle, max_new_tokens: int, num_threads: int, memory: int | None
    ) -> None:
        self._memory = memory
        self._manifest = bundle.manifest
        self._max_new_tokens = max_new_tokens
        self._partition = Partition(bundle, num_threads)
        self._tokenizer = ChatTokenizer(bundle)
        self._upper = UpperLayers(bundle, num_threads)
        self._pool = self._upper.new_pool(POOL_BYTES)
        self._rows: list[ExitRow] = []

    def encode(self, prompts: Iterable[str]) -> list[list[int]]:
        """The token ids of the prompts that leave room for an answer."""
        max_length = self._manifest.model.max_positions - self._max_new_tokens
        encoded = (self._tokenizer.encode(PromptRequest(prompt=text)) for text in prompts)
        return [token_ids for token_ids in encoded if len(token_ids) <= max_length]

    def record(self, prompts: Sequence[Sequence[int]], progress: Callable[[int], None]) -> Records:
        """Answer the prompts greedily, in batches; `progress` receives the number of answers."""
        longest = max(map(len, prompts)) + self._max_new_tokens
        size = batch_size(self._manifest, longest, self._memory)
        queue = deque(enumerate(prompts))
        batch: list[RecordedAnswer] = []
        while queue or batch:
            while queue and len(batch) < size:
                batch.append(self._begin(*queue.popleft()))
            batch = self._step(batch)
            progress(len(prompts) - len(queue) - len(batch))
        self._rows.sort(key=lambda row: row.answer)
        return Records(
            self._manifest.exits,
            np.array([row.answer for row in self._rows]),
            np.array([row.confidence for row in self._rows], np.float64),
            np.array([row.agrees for row in self._rows]),
        )

    def _begin(self, number: int, prompt_ids: Sequence[int]) -> RecordedAnswer:
        capacity = len(prompt_ids) + self._max_new_tokens
        return RecordedAnswer(
            number=number,
            cascade=Cascade(self._partition, capacity),
            lease=self._pool.lease(capacity),
            pending=prompt_ids,
        )

    def _step(self, batch: Sequence[RecordedAnswer]) -> list[RecordedAnswer]:
        """Generate one token of each answer; the answers that have not ended."""
        block = self._manifest.exits.index(self._manifest.upload_layer)
        num_exits = len(self._manifest.exits)
        candidates = []
        chunks = []
        for answer in batch:
            exits, hidden_states = answer.run_exits(block, num_exits)
            candidates.append(exits)
            start = answer.lease.length
            stop = answer.cascade.num_tokens
            chunks.append(Chunk(answer.lease, hidden_states, start, stop, [stop - 1]))
        token_ids: list[int] = self._upper(chunks).argmax(-1).tolist()
        steps = zip(batch, candidates, token_ids, strict=True)
        return [
            answer for answer, exits, token_id in steps if self._append(answer, exits, token_id)
        ]

    def _append(
        self, answer: RecordedAnswer, exits: Sequence[ExitCandidates], token_id: int
    ) -> bool:
        """Record a position and append its token; whether the answer continues."""
        confidence = [each.confidence for each in exits]
        agrees = [int(each.token_ids[0]) == token_id for each in exits]
        self._rows.append(ExitRow(answer.number, confidence, agrees))
        answer.pending = [token_id]
        answer.num_generated += 1
        is_eos = token_id in self._manifest.model.eos_token_ids
        if is_eos or answer.num_generated == self._max_new_tokens:
            self._pool.free_lease(answer.lease)
            return False
        return True


def batch_size(manifest: Manifest, num_positions: int, memory: int | None) -> int:
    """Return the number of answers whose caches need at most `memory` bytes with the bundle.

    It is at least 1.
    """
    if memory is None:
        return MAX_BATCH
    model = manifest.model
    cached = 2 * model.num_layers * model.num_key_value_heads * model.head_dim
    answer_bytes = num_positions * cached * FLOAT32_BYTES
    free = memory - NUM_COPIES * sum(file.num_bytes for file in manifest.files)
    return min(MAX_BATCH, max(1, free // answer_bytes))


def record(
    bundle: Bundle,
    prompts: Sequence[str],
    max_new_tokens: int,
    num_threads: int,
    progress: Callable[[int], None] = lambda _: None,
    check: Callable[[int], None] = lambda _: None,
    memory: int | None = None,
) -> Records:
    """Answer the prompts greedily with the full model, and record every exit at every position.

    The device's graphs run in ONNX Runtime, the worker's layers in PyTorch, with FP16 hidden states
    between them, as in a fleet. `progress` receives the number of finished answers. `check`
    receives the number of answers before the first one; its error ends the recording. `memory`, in
    bytes, limits the number of answers at once.

    Raises:
        ConfigError: there is no prompt, or none is short enough.
        MissingExtraError: an extra of devices or workers is not installed.
    """
    recorder = ExitRecorder(bundle, max_new_tokens, num_threads, memory)
    prompt_ids = recorder.encode(prompts)
    if not prompt_ids:
        raise ConfigError(
            f"none of {len(prompts)} prompts leaves room for {max_new_tokens} tokens; "
            "give shorter ones"
        )
    check(len(prompt_ids))
    return recorder.record(prompt_ids, progress)
