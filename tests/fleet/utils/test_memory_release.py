"""Pages of mapped files, returned to the system."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
import sys
from pathlib import Path

import pytest

from fleet.utils.memory_release import (
    mapped_ranges,
    release_mapped_pages,
    return_large_blocks,
)

MAPS = """\
55d0c0a00000-55d0c0a21000 rw-p 00000000 00:00 0       [heap]
7f0000000000-7f0000001000 rw-p 00000000 fe:00 42      /bundles/a b/block_0.onnx.data
7f0000002000-7f0000005000 rw-p 00001000 fe:00 42      /bundles/a b/block_0.onnx.data
7f0000006000-7f0000007000 rw-p 00000000 fe:00 43      /bundles/a b/block_0.onnx
7f0000008000-7f0000009000 rw-p 00000000 00:00 0
"""


def test_the_ranges_of_a_file_are_those_of_its_own_path() -> None:
    ranges = list(mapped_ranges(MAPS, Path("/bundles/a b/block_0.onnx.data")))
    assert ranges == [(0x7F0000000000, 0x7F0000001000), (0x7F0000002000, 0x7F0000005000)]
    assert list(mapped_ranges(MAPS, Path("/bundles/b"))) == []


def resident_kb(path: Path) -> int:
    """Return the resident size of this process's mappings of a file."""
    text = Path("/proc/self/smaps").read_text(encoding="utf-8")
    sizes = re.findall(rf"{re.escape(str(path))}\n(?:.*\n)*?Rss: +(\d+) kB", text)
    return sum(int(size) for size in sizes)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can return them")
def test_pages_of_a_mapped_file_are_returned_and_keep_their_content(tmp_path: Path) -> None:
    path = tmp_path / "block_0.onnx.data"
    content = bytes(range(256)) * (1 << 12)
    path.write_bytes(content)
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    assert mapped[:] == content
    before = resident_kb(path)
    release_mapped_pages(path)
    after = resident_kb(path)
    assert mapped[:] == content
    assert before == len(content) // 1024
    assert after < before


def test_a_file_that_is_not_mapped_is_no_error(tmp_path: Path) -> None:
    release_mapped_pages(tmp_path / "absent")


IS_MAPPED = 2
"""The bit of a block's size, before its content, with which glibc marks a mapping of its own."""


def has_own_mapping(libc: ctypes.CDLL, num_bytes: int) -> bool:
    """Allocate and free a block; return whether it was a mapping of its own."""
    address = libc.malloc(ctypes.c_size_t(num_bytes))
    size = ctypes.c_size_t.from_address(address - ctypes.sizeof(ctypes.c_size_t)).value
    libc.free(ctypes.c_void_p(address))
    return bool(size & IS_MAPPED)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc raises its limit")
def test_blocks_of_each_large_size_are_returned_when_they_are_freed() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    return_large_blocks()
    assert has_own_mapping(libc, 8 << 20)
    assert has_own_mapping(libc, 4 << 20)  # else glibc's limit is 8 MB from the first on
    assert not has_own_mapping(libc, 1 << 10)
