"""Answers recorded as deployed: uploads, confidences of exits, times of steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cloud_broker_worker.worker.kv_pool import KvLease
from cloud_broker_worker.worker.upper_layers import Chunk, UpperLayers
from edge_agent.engine.tokenizer import ChatTokenizer
from fleet.bundles.manifest import Bundle
from fleet.exits.exit_policy import exit_emits
from fleet.graphs.cascade import Cascade
from fleet.graphs.partition import Partition
from fleet.protocol.hidden_states import Float16
from fleet.protocol.prompt import ChatMessage


@dataclass(frozen=True, kw_only=True)
class AnswerRecording:
    """The full model's greedy answer to a prompt.

    `hidden_states` [n, hidden] float16 are those of the upload layer, and `token_ids` [n] the
    tokens of the same positions, of which the first `num_prompt` are the prompt's. For the token
    after position ``num_prompt - 1 + i`` exit k has `confidence[i][k]`, and its block took
    `seconds[i][k]` with the LM head; the deepest exit's best token is `guesses[i]`. The prompt took
    the blocks `prefill_s` in all.
    """

    token_ids: list[int]
    num_prompt: int
    hidden_states: Float16
    guesses: list[int]
    confidence: list[list[float]]
    seconds: list[list[float]]
    prefill_s: float

    @property
    def num_answer(self) -> int:
        """Tokens of the answer; the last one has no hidden state, as no token follows it."""
        return len(self.confidence)

    def token_id(self, i: int) -> int:
        """Return token `i` of the answer; the last one is unknown and is the device's guess."""
        position = self.num_prompt + i
        return self.token_ids[position] if position < len(self.token_ids) else self.guesses[i]

    def exit_at(self, i: int, thresholds: Sequence[float]) -> int | None:
        """Return the first exit that is confident for token `i` of the answer."""
        pairs = zip(self.confidence[i], thresholds, strict=True)
        return next(
            (
                k
                for k, (confidence, threshold) in enumerate(pairs)
                if exit_emits(confidence, threshold)
            ),
            None,
        )


def recorded_offload_rate(
    recordings: Sequence[AnswerRecording], thresholds: Sequence[float]
) -> float:
    """Return the share of tokens for which no exit is confident."""
    needs_cloud = [
        r.exit_at(i, thresholds) is None for r in recordings for i in range(r.num_answer)
    ]
    return sum(needs_cloud) / len(needs_cloud)


def record_answers(
    bundle: Bundle,
    upper: UpperLayers,
    prompts: Sequence[str],
    num_tokens: int,
    progress: Callable[[str], None],
) -> list[AnswerRecording]:
    """Record answers of exactly `num_tokens` tokens, on one thread.

    An end-of-sequence token does not end them.
    """
    partition = Partition(bundle, 1)
    tokenizer = ChatTokenizer(bundle)
    pool = upper.new_pool(1 << 40)
    recordings = []
    for number, prompt in enumerate(prompts, 1):
        progress(f"recording answer {number} of {len(prompts)}")
        prompt_ids = tokenizer.encode_chat([ChatMessage("user", prompt)])
        lease = pool.lease(len(prompt_ids) + num_tokens)
        recordings.append(_record(partition, upper, lease, prompt_ids, num_tokens))
        pool.free_lease(lease)
    return recordings


def _record(
    partition: Partition,
    upper: UpperLayers,
    lease: KvLease,
    prompt_ids: Sequence[int],
    num_tokens: int,
) -> AnswerRecording:
    manifest = partition.manifest
    block = manifest.exits.index(manifest.upload_layer)
    num_exits = len(manifest.exits)
    cascade = Cascade(partition, len(prompt_ids) + num_tokens)
    token_ids = list(prompt_ids)
    waiting = list(prompt_ids)
    guesses = []
    confidence = []
    seconds = []
    prefill_s = 0.0
    for i in range(num_tokens):
        start = cascade.num_filled(block)
        cascade.append(waiting)
        candidates = []
        times = []
        for k in range(num_exits):
            began = time.perf_counter()
            candidates.append(cascade.run(k))
            times.append(time.perf_counter() - began)
        stop = cascade.num_filled(block)
        rows = cascade.hidden_states(block, start).astype(np.float16)
        logits = upper([Chunk(lease, rows, start, stop, [stop - 1])])
        waiting = [int(logits.argmax())]
        token_ids += waiting
        guesses.append(int(candidates[-1].token_ids[0]))
        confidence.append([c.confidence for c in candidates])
        prefill_s = prefill_s or sum(times)
        seconds.append(times if i else [0.0] * num_exits)
    hidden_states = cascade.hidden_states(block, 0).astype(np.float16)
    return AnswerRecording(
        token_ids=token_ids[:-1],
        num_prompt=len(prompt_ids),
        hidden_states=hidden_states,
        guesses=guesses,
        confidence=confidence,
        seconds=seconds,
        prefill_s=prefill_s,
    )
