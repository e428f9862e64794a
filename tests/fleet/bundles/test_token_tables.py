"""Tables of a vector per token, mapped from their files."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from fleet.bundles.manifest import Bundle
from fleet.bundles.token_tables import (
    EMBEDDING,
    MAX_BLOCKS,
    load_table,
    release_table,
    split_mapping,
)
from tests.fleet.utils.test_memory_release import resident_kb

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux reports the pages of a mapping"
)


def mapped_file(path: Path) -> mmap.mmap:
    """Return a mapping of a file, in blocks."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_RANDOM)
    split_mapping(mapped)
    return mapped


def test_a_row_that_is_read_maps_its_block_alone(tmp_path: Path) -> None:
    path = tmp_path / "embedding.npy"
    content = bytes(range(256)) * (1 << 14)
    path.write_bytes(content)
    with path.open("r+b") as file:
        os.fsync(file.fileno())  # its pages can be mapped around the one that is read
    mapped = mapped_file(path)
    assert mapped[1 << 20] == content[1 << 20]
    assert resident_kb(path) <= 16
    assert mapped[:] == content


def test_a_large_table_has_a_bounded_number_of_blocks(tmp_path: Path) -> None:
    path = tmp_path / "embedding.npy"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    mapped = mapped_file(path)
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert MAX_BLOCKS / 2 < maps.count(str(path)) <= MAX_BLOCKS
    mapped.close()


def test_a_table_that_is_released_has_no_pages_and_the_same_content(tiny_bundle: Bundle) -> None:
    table = load_table(tiny_bundle, EMBEDDING)
    before = np.array(table)
    release_table(table)
    np.testing.assert_array_equal(table, before)
    release_table(before)  # not mapped


def test_the_pages_of_a_released_table_are_unmapped(tmp_path: Path) -> None:
    path = tmp_path / "table.npy"
    np.save(path, np.ones((512, 512), np.float16))
    table = np.load(path, mmap_mode="r")
    assert (table == 1).all()
    assert resident_kb(path) > 0
    release_table(table)
    assert resident_kb(path) == 0
