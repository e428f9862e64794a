"""Files that are pipes, as a shell's process substitution makes them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def in_pipe(data: bytes) -> Iterator[Path]:
    """The path of a pipe that holds `data`, at most 64 KiB."""
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    try:
        yield Path(f"/dev/fd/{reader}")
    finally:
        os.close(reader)
