"""Runs a bundle as it is deployed, both halves in this process, and records what each exit would have said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from fleet.cli.lazy import load
from fleet.errors import ConfigError
from fleet.exits.records import Records
from fleet.manifest import Bundle
from fleet.prompt import ChatMessage

BATCH: Final = 32  # answers at once: the cloud half runs them as one ragged batch
POOL_BYTES: Final = 1 << 40  # the leases of one batch are all that is out


class Answering:
    """One answer under way: the device's cascade and the worker's cache."""

    def __init__(self, cascade: Any, lease: Any, prompt_ids: Sequence[int], number: int) -> None:
        self.cascade, self.lease, self.number = cascade, lease, number
        self.waiting = list(prompt_ids)
        self.count = 0


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
    partition = load("edge_agent.partition").Partition(bundle, num_threads)
    tokenizer = load("edge_agent.tokenizer").ChatTokenizer(bundle)
    cascade_of = load("edge_agent.cascade").Cascade
    upper = load("cloud_broker_worker.upper_layers").UpperLayers(bundle, num_threads)
    chunk_of = load("cloud_broker_worker.upper_layers").Chunk
    manifest = bundle.manifest
    block = manifest.exits.index(manifest.upload_layer)
    pool = upper.new_pool(POOL_BYTES)
    chats = [tokenizer.encode_chat([ChatMessage("user", prompt)]) for prompt in prompts]
    fitting = [ids for ids in chats if len(ids) + max_new_tokens <= manifest.model.max_positions]
    if not fitting:
        raise ConfigError(f"none of {len(prompts)} prompts leaves room for {max_new_tokens} tokens; give shorter ones")
    rows: list[tuple[int, list[float], list[bool]]] = []
    for first in range(0, len(fitting), BATCH):
        batch = [
            Answering(
                cascade_of(partition, len(ids) + max_new_tokens), pool.lease(len(ids) + max_new_tokens), ids, first + i
            )
            for i, ids in enumerate(fitting[first : first + BATCH])
        ]
        while batch:
            said = [ask_exits(answer, block, len(manifest.exits)) for answer in batch]
            logits = upper([chunk_of(a.lease, a.lease.length, a.cascade.num_tokens) for a in batch])
            for answer, exits, token_id in zip(batch, said, logits.argmax(-1).tolist(), strict=True):
                rows.append(
                    (answer.number, [e.confidence for e in exits], [int(e.token_ids[0]) == token_id for e in exits])
                )
                answer.waiting = [token_id]
                answer.count += 1
            going = []
            for answer in batch:
                if answer.waiting[0] in manifest.model.eos_token_ids or answer.count == max_new_tokens:
                    pool.release(answer.lease)
                else:
                    going.append(answer)
            batch = going
            progress(min(first + BATCH, len(fitting)) - len(batch))
    rows.sort(key=lambda row: row[0])
    numbers, confidence, agrees = zip(*rows, strict=True)
    return Records(manifest.exits, np.array(numbers), np.array(confidence, np.float64), np.array(agrees))


def ask_exits(answer: Answering, block: int, num_exits: int) -> list[Any]:
    """Runs all blocks over what waits and hands the hidden states to the worker's half; what each exit says."""
    start = answer.cascade.num_filled(block)
    answer.cascade.append(answer.waiting)
    said = [answer.cascade.run(i) for i in range(num_exits)]
    answer.lease.hidden_states[start : answer.cascade.num_tokens] = answer.cascade.hidden_states(block, start)
    return said
