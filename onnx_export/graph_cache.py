"""Cache of exported graphs, keyed by the hash of all their inputs (docs/adr/0008)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Protocol

import onnx
import torch
from filelock import FileLock

from onnx_export.checkpoint import cache_folder
from onnx_export.fingerprints import source_digest
from onnx_export.graph_weights import Read

MAX_CACHE_BYTES: Final = 4 << 30
DIGEST_BYTES: Final = 32
SIZE_BYTES: Final = 8
PIECE_BYTES: Final = 1 << 20
LOCK_FILE: Final = ".lock"
PARTIAL_FILE: Final = ".partial"


class Digest(Protocol):
    """A digest of the standard library."""

    def update(self, data: bytes, /) -> None: ...


def default_graph_cache() -> GraphCache:
    """Return the user's cache of graphs."""
    return GraphCache(cache_folder() / "parts")


def graph_key(weights: Mapping[str, Read], **options: object) -> str:
    """Return a hex digest of a graph's inputs and our sources.

    The inputs are weights by name, read one at a time, and options whose ``repr`` shows their
    value.
    """
    digest = hashlib.sha256(f"{source_digest()} {sorted(options.items())!r}".encode())
    for name, read in sorted(weights.items()):
        tensor = read().detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class GraphCache:
    """A folder of graphs, one file each: the SHA-256 of the rest, the size of the graph, the graph,
    and the file of its large weights.

    The least recently used graphs are removed first. Writers hold a lock and readers see whole
    files only, so exports may run at the same time or be killed.
    """

    folder: Path
    max_bytes: int = MAX_CACHE_BYTES

    def get_or_make(
        self, key: str, make: Callable[[], onnx.ModelProto], data: Path | None = None
    ) -> tuple[onnx.ModelProto, bool]:
        """Return the graph under `key` and whether it was stored. Make and store a missing one.

        `data` is the file of its large weights, which `make` writes.
        """
        cached = self._read(key, data)
        if cached is not None:
            return cached, True
        graph = make()
        self._write(key, graph.SerializeToString(deterministic=True), data)
        return graph, False

    def _read(self, key: str, data: Path | None) -> onnx.ModelProto | None:
        """Return the graph and write its weights to `data`; None when it is missing or damaged."""
        path = self.folder / key
        try:
            os.utime(path)
            file = path.open("rb")
        except OSError:
            return None
        with file:
            digest = file.read(DIGEST_BYTES)
            prefix = file.read(SIZE_BYTES)
            graph = file.read(min(int.from_bytes(prefix), path.stat().st_size))
            actual = hashlib.sha256(prefix + graph)
            if data is not None:
                with data.open("wb") as copy:
                    copy_file(file, copy, actual)
        if actual.digest() == digest:
            return onnx.load_model_from_string(graph)
        if data is not None:
            data.unlink()
        return None

    def _write(self, key: str, graph: bytes, data: Path | None) -> None:
        """Store a graph; without room on the disk it is not stored."""
        weights_bytes = data.stat().st_size if data is not None and data.exists() else 0
        if len(graph) + weights_bytes > self.max_bytes:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / LOCK_FILE):
                self._replace(self.folder / key, graph, data)
                self._prune()
        except OSError:
            return

    def _replace(self, path: Path, graph: bytes, data: Path | None) -> None:
        """Write a graph's file whole or not at all; the caller holds the lock."""
        # Only the lock's holder writes the partial file, so a killed writer's one is overwritten.
        partial = self.folder / PARTIAL_FILE
        content = len(graph).to_bytes(SIZE_BYTES) + graph
        digest = hashlib.sha256(content)
        try:
            with partial.open("wb") as file:
                file.write(bytes(DIGEST_BYTES) + content)
                if data is not None and data.exists():
                    with data.open("rb") as weights:
                        copy_file(weights, file, digest)
                file.seek(0)
                file.write(digest.digest())
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


def copy_file(source: BinaryIO, target: BinaryIO, digest: Digest) -> None:
    """Copy the rest of a file and add it to a digest."""
    while piece := source.read(PIECE_BYTES):
        digest.update(piece)
        target.write(piece)
