"""Memory that a process needs no longer, returned to the system."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

MAPS: Final = Path("/proc/self/maps")
MADV_PAGEOUT: Final = 21  # of Linux 5.4 and later
M_MMAP_THRESHOLD: Final = -3  # of glibc
LARGE_BLOCK_BYTES: Final = 128 * 1024


def release_freed_memory() -> None:
    """Return freed memory to the system, if the C library can do so (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def return_large_blocks() -> None:
    """Make the C library return each large block as soon as it is freed, where it can (glibc).

    By default glibc raises its limit of a large block, up to 32 MB, when such a block is freed.
    Later blocks then come from heaps, which keep what lies below a block that is still in use.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def release_unused_memory() -> None:
    """Collect garbage, and return all freed memory to the system."""
    gc.collect()
    release_freed_memory()


def release_mapped_pages(path: Path) -> None:
    """Return the pages of a file that is mapped into this process, where the system can do so.

    Linux reads a page from the file again if it is used. No content can be lost, not even if
    another thread meanwhile maps something else there.
    """
    with suppress(OSError, AttributeError):
        madvise = ctypes.CDLL(None).madvise
        for start, stop in mapped_ranges(MAPS.read_text(encoding="utf-8"), path.resolve()):
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_PAGEOUT)


def mapped_ranges(maps: str, path: Path) -> Iterator[tuple[int, int]]:
    """Yield the address ranges [start, stop) of a file's mappings, from the text of `MAPS`."""
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == str(path):
            start, _, stop = fields[0].partition("-")
            yield int(start, 16), int(stop, 16)
