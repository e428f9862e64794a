"""A bundle's tables of a vector per token: the embedding, and the weights of an untied LM head."""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fleet.bundles.manifest import Bundle
from fleet.errors import BundleError

Table = npt.NDArray[np.floating[Any]]

MIN_BLOCK_PAGES: Final = 4
MAX_BLOCKS: Final = 4096  # Linux allows 65,530 mappings by default
EMBEDDING: Final = "edge/embedding.npy"
LM_HEAD: Final = "edge/lm_head.npy"


def load_tables(bundle: Bundle) -> tuple[Table, Table]:
    """Load the embedding and the LM head's weights; see `load_table`.

    They are the same array for a model that ties them.
    """
    embedding = load_table(bundle, EMBEDDING)
    is_untied = any(entry.path == LM_HEAD for entry in bundle.manifest.files)
    return embedding, load_table(bundle, LM_HEAD) if is_untied else embedding


def load_table(bundle: Bundle, name: str) -> Table:
    """Map a table [vocab, hidden] in float16 or float32 into memory, without reading it.

    Raises:
        BundleError: the bundle has no such file, or its content is no such table.
    """
    model = bundle.manifest.model
    path = bundle.path(name)
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        text = f"{path} is no NumPy file of a table ({error}); export the bundle again"
        raise BundleError(text) from None
    expected = model.vocab_size, model.hidden_size
    if mapped.shape != expected or mapped.dtype not in (np.float16, np.float32):
        raise BundleError(
            f"{path}: expected floats {expected}, got {mapped.dtype} {mapped.shape}; "
            "export the bundle again"
        )
    # Without this the kernel also reads the neighbours of each row.
    mapped.base.madvise(mmap.MADV_RANDOM)
    split_mapping(mapped.base)
    table: Table = np.asarray(mapped)
    return table


def split_mapping(mapped: mmap.mmap) -> None:
    """Split a mapping into blocks, where the system can do so, which keep their content.

    Linux maps up to 2 MB around a page that is read, if they are in its cache of files, but not
    beyond a mapping, and two neighbours with different advice are two mappings. Whether a block is
    part of a core dump is of no importance for a file.
    """
    num_bytes = len(mapped)
    pages = -(-num_bytes // (MAX_BLOCKS * mmap.PAGESIZE))
    block_bytes = max(MIN_BLOCK_PAGES, pages) * mmap.PAGESIZE
    with suppress(OSError, AttributeError):
        for start in range(0, num_bytes, 2 * block_bytes):
            mapped.madvise(mmap.MADV_DONTDUMP, start, min(block_bytes, num_bytes - start))


def release_table(table: Table) -> None:
    """Unmap the pages of a table that `load_table` has mapped.

    They stay in the system's cache of files, and a row that is read is mapped again.
    """
    base: Any = table
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)
