"""The baselines' models in the cloud: whole, upper half, and a peer's; one session at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from transformers import AutoConfig

from benchmarks.drivers.wire import Hidden, Prompt, Rows, ToCloud
from benchmarks.engines import EngineProcess
from cloud_broker_worker.worker.kv_pool import KvLease
from cloud_broker_worker.worker.upper_layers import Chunk, UpperLayers
from fleet.bundles.manifest import Bundle
from fleet.errors import ProtocolError
from onnx_export.variants import embedding_scale, state_scale

POOL_BYTES: Final = 1 << 34


class CloudModel(Protocol):
    """A model that answers messages of sessions.

    `positions` have run so far, each through all `num_layers`, and the LM head `head_calls` times.
    """

    num_layers: int
    positions: int
    head_calls: int
    pid: int | None  # the process that computes, if it is another one

    def answer(self, session: str, message: ToCloud) -> Iterator[int]:
        """Yield greedy tokens, each when it is known; raise ProtocolError for a wrong message."""
        ...


class _Layers:
    """Layers of a bundle in the worker's own engine."""

    def __init__(self, bundle: Bundle) -> None:
        self.positions = self.head_calls = 0
        self.pid: int | None = None
        self._layers = UpperLayers(bundle, 1)
        self._pool = self._layers.new_pool(POOL_BYTES)
        self._lease: KvLease | None = None
        self._model = bundle.manifest.model
        self.num_layers = self._model.num_layers - bundle.manifest.upload_layer

    def _begin(self, capacity: int) -> KvLease:
        """Return a cache for a new session; the session before has ended."""
        if self._lease:
            self._pool.free_lease(self._lease)
        self._lease = self._pool.lease(capacity)
        return self._lease

    def _next(self, lease: KvLease, rows: Rows) -> int:
        """Return the best token after the next positions, given their hidden states [n, hidden]."""
        start = lease.length
        stop = lease.length + len(rows)
        self.positions += len(rows)
        self.head_calls += 1
        return int(self._layers([Chunk(lease, rows, start, stop, [stop - 1])]).argmax())


class WholeCloudModel(_Layers):
    """The model of a cloud-only service."""

    def __init__(self, bundle: Bundle, embedding: Path) -> None:
        """`bundle` has every layer; `embedding` is a file [vocab, hidden]."""
        super().__init__(bundle)
        self._embedding = np.load(embedding, mmap_mode="r")
        config = AutoConfig.from_pretrained(bundle.folder / "cloud")
        self._scale = embedding_scale(config) / state_scale(config)

    def answer(self, session: str, message: ToCloud) -> Iterator[int]:
        if not isinstance(message, Prompt):
            raise ProtocolError(f"expected a prompt in session {session}, got hidden states")
        lease = self._begin(len(message.token_ids) + message.max_new_tokens)
        token_ids: Sequence[int] = message.token_ids
        for _ in range(message.max_new_tokens):
            rows = self._embedding[list(token_ids)] * np.float32(self._scale)
            token_id = self._next(lease, rows.astype(np.float16))
            yield token_id
            token_ids = [token_id]


class UpperCloudModel(_Layers):
    """The upper half of a split model; its cache is kept even if all positions are sent again."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self._session = ""
        self._pieces: list[Rows] = []
        self._start = 0

    def answer(self, session: str, message: ToCloud) -> Iterator[int]:
        if not isinstance(message, Hidden):
            raise ProtocolError(f"expected hidden states in session {session}, got a prompt")
        if session != self._session or self._lease is None:
            self._begin(message.capacity)
            self._session = session
            self._pieces = []
        if not self._pieces:
            self._start = message.start
        self._pieces.append(message.rows(self._model.hidden_size))
        if message.is_last and self._lease:
            rows = np.concatenate(self._pieces)
            self._pieces = []
            if self._start > self._lease.length:
                raise ProtocolError(
                    f"expected positions from {self._lease.length} on, "
                    f"got them from {self._start} on"
                )
            yield self._next(self._lease, rows[self._lease.length - self._start :])


class PeerCloudModel:
    """Another project's engine, in a separate process."""

    def __init__(self, engine: EngineProcess, num_layers: int) -> None:
        self.num_layers = num_layers
        self.positions = self.head_calls = 0
        self.pid: int | None = engine.pid
        self._engine = engine

    def answer(self, session: str, message: ToCloud) -> Iterator[int]:
        if not isinstance(message, Prompt):
            raise ProtocolError(f"expected a prompt in session {session}, got hidden states")
        self.positions += len(message.token_ids) - 1
        arguments = {"prompt": list(message.token_ids), "new_tokens": message.max_new_tokens}
        for line in self._engine.stream("generate", **arguments):
            self.positions += 1  # the token before it
            self.head_calls += 1
            yield int(line["token_id"])
