"""Graphs kept from earlier exports, by the hash of everything that they were made from (docs/adr/0008)."""

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

MAX_PART_BYTES: Final = 1 << 30
MAX_CACHE_BYTES: Final = 4 << 30
DIGEST_BYTES: Final = 32
LOCK_FILE: Final = ".lock"
PARTIAL_FILE: Final = ".partial"


def default_parts() -> PartCache:
    """The user's cache of parts."""
    return PartCache(cache_folder() / "parts")


def part_key(tensors: Mapping[str, Any], **options: object) -> str:
    """Hex digest of a part's inputs: torch tensors by name, options whose ``repr`` tells their value, our sources."""
    digest = hashlib.sha256(f"{source_digest()} {sorted(options.items())!r}".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class PartCache:
    """A folder of graphs, one file each: SHA-256 of the rest, then the graph. The least recently used go first.

    Writers take turns by a lock, and readers see whole files only, so that exports may run at once or be killed.
    """

    folder: Path
    max_bytes: int = MAX_CACHE_BYTES

    def get_or_make(
        self, key: str, make: Callable[[], onnx.ModelProto]
    ) -> tuple[onnx.ModelProto, bool]:
        """The graph kept under `key`, else what `make` gives, which is kept; and whether it was there."""
        if (kept := self._read(key)) is not None:
            return kept, True
        graph = make()
        if graph.ByteSize() <= min(MAX_PART_BYTES, self.max_bytes):
            self._write(key, graph.SerializeToString(deterministic=True))
        return graph, False

    def _read(self, key: str) -> onnx.ModelProto | None:
        """The graph, or None when it is not there or damaged."""
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
        """Keeps a graph; without room on the disk it is not kept."""
        partial = (
            self.folder / PARTIAL_FILE
        )  # only who holds the lock writes it: a killed writer's is overwritten
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / LOCK_FILE):
                try:
                    partial.write_bytes(hashlib.sha256(payload).digest() + payload)
                    partial.replace(self.folder / key)
                finally:
                    partial.unlink(missing_ok=True)
                self._prune()
        except OSError:
            return

    def _prune(self) -> None:
        """Removes the least recently used parts until the rest fits."""
        parts = [path for path in self.folder.iterdir() if not path.name.startswith(".")]
        room = self.max_bytes
        for path in sorted(parts, key=lambda path: path.stat().st_mtime_ns, reverse=True):
            room -= path.stat().st_size
            if room < 0:
                path.unlink()
