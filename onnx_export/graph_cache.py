"""Cache of exported graphs, keyed by the hash of all their inputs (docs/adr/0008)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnx
from filelock import FileLock

from onnx_export.checkpoint import cache_folder
from onnx_export.fingerprints import source_digest

MAX_GRAPH_BYTES: Final = 1 << 30
MAX_CACHE_BYTES: Final = 4 << 30
DIGEST_BYTES: Final = 32
LOCK_FILE: Final = ".lock"
PARTIAL_FILE: Final = ".partial"


def default_graph_cache() -> GraphCache:
    """Return the user's cache of graphs."""
    return GraphCache(cache_folder() / "parts")


def graph_key(tensors: Mapping[str, Any], **options: object) -> str:
    """Return a hex digest of a graph's inputs and our sources.

    The inputs are torch tensors by name, and options whose ``repr`` shows their value.
    """
    digest = hashlib.sha256(f"{source_digest()} {sorted(options.items())!r}".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def initializer_bytes(graph: onnx.ModelProto) -> int:
    """Return the size of a graph's weights, also for a graph too large for one protobuf message."""
    return sum(len(tensor.raw_data) for tensor in graph.graph.initializer)


@dataclass(frozen=True)
class GraphCache:
    """A folder of graphs, one file each: the SHA-256 of the rest, then the graph.

    The least recently used graphs are removed first. Writers hold a lock and readers see whole
    files only, so exports may run at the same time or be killed.
    """

    folder: Path
    max_bytes: int = MAX_CACHE_BYTES

    def get_or_make(
        self, key: str, make: Callable[[], onnx.ModelProto]
    ) -> tuple[onnx.ModelProto, bool]:
        """Return the graph under `key` and whether it was stored. Make and store a missing one."""
        cached = self._read(key)
        if cached is not None:
            return cached, True
        graph = make()
        # A message over 2 GiB has no size and no serialised form: protobuf raises an error.
        if initializer_bytes(graph) <= min(MAX_GRAPH_BYTES, self.max_bytes):
            self._write(key, graph.SerializeToString(deterministic=True))
        return graph, False

    def _read(self, key: str) -> onnx.ModelProto | None:
        """Return the graph, or None when it is missing or damaged."""
        path = self.folder / key
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        digest = content[:DIGEST_BYTES]
        payload = memoryview(content)[DIGEST_BYTES:]
        if hashlib.sha256(payload).digest() != digest:
            return None
        return onnx.load_model_from_string(bytes(payload))

    def _write(self, key: str, payload: bytes) -> None:
        """Store a graph; without room on the disk it is not stored."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / LOCK_FILE):
                self._replace(self.folder / key, payload)
                self._prune()
        except OSError:
            return

    def _replace(self, path: Path, payload: bytes) -> None:
        """Write a graph's file whole or not at all; the caller holds the lock."""
        # Only the lock's holder writes the partial file, so a killed writer's one is overwritten.
        partial = self.folder / PARTIAL_FILE
        try:
            partial.write_bytes(hashlib.sha256(payload).digest() + payload)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _prune(self) -> None:
        """Remove the least recently used graphs until the rest fits."""
        graphs = [path for path in self.folder.iterdir() if not path.name.startswith(".")]
        graphs.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        room = self.max_bytes
        for path in graphs:
            room -= path.stat().st_size
            if room < 0:
                path.unlink()
