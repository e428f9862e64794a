"""The suffix tables of a device: one for each app and trigger, kept in files."""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

import numpy as np

from edge_agent.config import TableStorage
from edge_agent.generation.suffix_table import MAX_TOKENS, SuffixTable
from fleet.bundles.manifest import Manifest
from fleet.protocol.topics import NAME
from fleet.utils.atomic_files import write_file
from fleet.utils.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)
save_log = RateLimitedLog(log, 600.0)

TABLES_FOLDER: Final = "suffix-tables"
SUFFIX: Final = ".tokens"
FILE_NAME: Final = re.compile(rf"{NAME.pattern}(\.{NAME.pattern})?{re.escape(SUFFIX)}")
MAGIC: Final = b"suffix table 1\n"
DIGEST_BYTES: Final = hashlib.sha256().digest_size
TOKEN_TYPE: Final = np.dtype("<i4")
MAX_TABLES: Final = 16
SAVE_S: Final = 600.0
"""Least time between two writes of a table, so that a memory card lasts."""


class SuffixTables:
    """The tables of the `MAX_TABLES` apps and triggers that were used last; any thread may use it.

    No app sees the table of another one. Without a folder nothing is kept on disk. With `is_off`
    every answer begins with an empty table.
    """

    def __init__(
        self,
        folder: Path | None,
        tokenizer: str,
        vocab_size: int,
        *,
        is_off: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Store the settings; files are read when they are needed.

        Args:
            folder: the folder of the files, made with the first one.
            tokenizer: SHA-256 of the tokenizer, in hexadecimal digits. The tables of another
                tokenizer are discarded.
            vocab_size: the number of token ids.
            is_off: keep no table.
            clock: seconds that only grow.
        """
        self._folder = folder
        self._tokenizer = bytes.fromhex(tokenizer)
        self._vocab_size = vocab_size
        self._is_off = is_off
        self._clock = clock
        self._tables: OrderedDict[str, _KeptTable] = OrderedDict()
        self._lock = threading.Lock()
        self._disk_lock = threading.Lock()  # of writes, for which no answer waits

    @classmethod
    def for_bundle(cls, manifest: Manifest, folder: Path | None, storage: TableStorage) -> Self:
        """Return the tables of a device that serves this bundle; `folder` None has no files.

        Unless they are stored on disk, the files that are there are removed.
        """
        if folder and storage != "disk":
            _remove_files(folder)
        return cls(
            folder if storage == "disk" else None,
            manifest.tokenizer_sha256,
            manifest.model.vocab_size,
            is_off=storage == "off",
        )

    def of(self, app: str, trigger: str | None = None) -> SuffixTable:
        """Return the table of an app, or of one of its triggers."""
        if self._is_off:
            return SuffixTable()
        name = f"{app}.{trigger}{SUFFIX}" if trigger else f"{app}{SUFFIX}"
        with self._lock:
            if name not in self._tables:
                self._tables[name] = _KeptTable(self._load(name), self._clock())
            self._tables.move_to_end(name)
            return self._tables[name].table

    def save(self, *, is_last: bool = False) -> None:
        """Write the tables that have changed, each at most once in `SAVE_S` seconds, and drop those
        beyond `MAX_TABLES`.

        `is_last` writes them at once.
        """
        with self._disk_lock:
            for name, kept in self._due(is_last=is_last):
                self._write(name, kept.table)

    def _due(self, *, is_last: bool) -> list[tuple[str, _KeptTable]]:
        """Return the tables to write now, the one that was used last at the end."""
        now = self._clock()
        with self._lock:
            due = [
                (name, kept)
                for name, kept in self._tables.items()
                if kept.is_changed and (is_last or now - kept.saved_at >= SAVE_S)
            ]
            for _, kept in due:
                kept.saved_at = now
                kept.num_saved = kept.table.num_added
            while len(self._tables) > MAX_TABLES:
                self._tables.popitem(last=False)
        return due

    def _path(self, name: str) -> Path | None:
        """Return the path of a table's file; None if it has none."""
        return self._folder / name if self._folder and FILE_NAME.fullmatch(name) else None

    def _load(self, name: str) -> SuffixTable:
        """Read a table; a file that does not fit is discarded."""
        path = self._path(name)
        if path is None:
            return SuffixTable()
        try:
            return SuffixTable(self._decode(_read(path)))
        except FileNotFoundError:
            return SuffixTable()
        except OSError as error:
            save_log.warning("suffix table %s cannot be read, and is empty now: %s", path, error)
        except ValueError as error:
            log.warning("suffix table %s is discarded: %s", path, error)
            with suppress(OSError):  # a folder that cannot be written
                path.unlink(missing_ok=True)
        return SuffixTable()

    def _write(self, name: str, table: SuffixTable) -> None:
        path = self._path(name)
        if path is None:
            return
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            write_file(path, self._encode(table.token_ids))
            self._remove_surplus(path.parent)
        except OSError as error:
            save_log.warning("suffix table %s cannot be written: %s", path, error)

    def _remove_surplus(self, folder: Path) -> None:
        """Remove the oldest files beyond `MAX_TABLES`."""
        paths = sorted(folder.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime)
        for path in paths[:-MAX_TABLES]:
            path.unlink(missing_ok=True)

    def _encode(self, token_ids: array[int]) -> bytes:
        content = self._tokenizer + np.asarray(token_ids, TOKEN_TYPE).tobytes()
        return MAGIC + hashlib.sha256(content).digest() + content

    def _decode(self, data: bytes) -> list[int]:
        """Return the token ids of a file. Raises ValueError if it does not fit."""
        start = len(MAGIC) + DIGEST_BYTES
        content = data[start:]
        if not data.startswith(MAGIC):
            raise ValueError("it is of another version")
        if hashlib.sha256(content).digest() != data[len(MAGIC) : start]:
            raise ValueError("it is damaged")
        if not content.startswith(self._tokenizer):
            raise ValueError("it is of another tokenizer")
        token_ids = np.frombuffer(content[len(self._tokenizer) :], TOKEN_TYPE)
        if len(token_ids) and not -1 <= token_ids.min() <= token_ids.max() < self._vocab_size:
            raise ValueError(f"it has token ids of more than the {self._vocab_size} known ones")
        known: list[int] = token_ids.tolist()
        return known


class _KeptTable:
    """A table with the number of its texts that the file has, and the time of the last write."""

    def __init__(self, table: SuffixTable, now: float) -> None:
        self.table = table
        self.num_saved = 0
        self.saved_at = now

    @property
    def is_changed(self) -> bool:
        """Whether the file lacks a text."""
        return self.num_saved < self.table.num_added


def _remove_files(folder: Path) -> None:
    try:
        for path in folder.glob(f"*{SUFFIX}"):
            path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("suffix tables in %s cannot be removed: %s", folder, error)


def _read(path: Path) -> bytes:
    """Return the content of a file that is no longer than a table can be."""
    max_bytes = len(MAGIC) + 2 * DIGEST_BYTES + MAX_TOKENS * TOKEN_TYPE.itemsize
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"it is longer than {max_bytes} bytes")
    return data
