"""Runs a bundle as it is deployed, both halves in this process, and records what each exit would have said."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from fleet.bundles.manifest import Bundle
from fleet.errors import ConfigError
from fleet.exits.records import Records
from fleet.protocol.prompt import ChatMessage
from fleet.utils.optional_imports import load

BATCH: Final = 32  # answers at once: the cloud half runs them as one ragged batch
POOL_BYTES: Final = 1 << 40  # no more leases are out than a batch has


class Answering:
    """One answer under way: the device's cascade and the worker's cache."""

    def __init__(self, cascade: Any, lease: Any, prompt_ids: Sequence[int], number: int) -> None:
        self.cascade = cascade
        self.lease = lease
        self.number = number
        self.waiting = list(prompt_ids)
        self.uploaded: Any = None  # [n, hidden] float16
        self.count = 0
        self.finished = False


def record(
    bundle: Bundle,
    prompts: Sequence[str],
    max_new_tokens: int,
    num_threads: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Records:
    """The full model answers the prompts greedily, and every exit is asked at every position.

    The device's graphs run in ONNX Runtime, the worker's layers in PyTorch, with FP16 hidden states between them, as in
    a fleet. `progress` hears how many answers are finished.

    Raises:
        ConfigError: there is no prompt, or none is short enough.
        MissingExtraError: what devices or workers need is not installed.
    """
    partition = load("edge_agent.engine.partition").Partition(bundle, num_threads)
    tokenizer = load("edge_agent.engine.tokenizer").ChatTokenizer(bundle)
    cascade_of = load("edge_agent.engine.cascade").Cascade
    upper = load("cloud_broker_worker.worker.upper_layers").UpperLayers(bundle, num_threads)
    chunk_of = load("cloud_broker_worker.worker.upper_layers").Chunk
    manifest = bundle.manifest
    block = manifest.exits.index(manifest.upload_layer)
    pool = upper.new_pool(POOL_BYTES)
    chats = [tokenizer.encode_chat([ChatMessage("user", prompt)]) for prompt in prompts]
    fitting = [ids for ids in chats if len(ids) + max_new_tokens <= manifest.model.max_positions]
    if not fitting:
        raise ConfigError(
            f"none of {len(prompts)} prompts leaves room for {max_new_tokens} tokens; give shorter ones"
        )
    rows: list[tuple[int, list[float], list[bool]]] = []
    queue = deque(enumerate(fitting))
    batch: list[Answering] = []
    while queue or batch:
        while queue and len(batch) < BATCH:
            number, prompt_ids = queue.popleft()
            capacity = len(prompt_ids) + max_new_tokens
            batch.append(
                Answering(cascade_of(partition, capacity), pool.lease(capacity), prompt_ids, number)
            )
        said = [ask_exits(answer, block, len(manifest.exits)) for answer in batch]
        stops = [answer.cascade.num_tokens for answer in batch]
        logits = upper(
            [
                chunk_of(answer.lease, answer.uploaded, answer.lease.length, stop, [stop - 1])
                for answer, stop in zip(batch, stops, strict=True)
            ]
        )
        for answer, exits, token_id in zip(batch, said, logits.argmax(-1).tolist(), strict=True):
            equal = [int(candidates.token_ids[0]) == token_id for candidates in exits]
            rows.append((answer.number, [candidates.confidence for candidates in exits], equal))
            answer.waiting = [token_id]
            answer.count += 1
            if token_id in manifest.model.eos_token_ids or answer.count == max_new_tokens:
                pool.take_back(answer.lease)
                answer.finished = True
        batch = [answer for answer in batch if not answer.finished]
        progress(len(fitting) - len(queue) - len(batch))
    rows.sort(key=lambda row: row[0])
    numbers, confidence, agrees = zip(*rows, strict=True)
    return Records(
        manifest.exits, np.array(numbers), np.array(confidence, np.float64), np.array(agrees)
    )


def ask_exits(answer: Answering, block: int, num_exits: int) -> list[Any]:
    """Runs all blocks over what waits, with the hidden states that a device would upload; what each exit says."""
    start = answer.cascade.num_filled(block)
    answer.cascade.append(answer.waiting)
    said = [answer.cascade.run(i) for i in range(num_exits)]
    answer.uploaded = answer.cascade.hidden_states(block, start).astype(np.float16)
    return said
