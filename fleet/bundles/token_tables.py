"""A bundle's tables of one vector per token: the embedding, and the LM head's weights where they are not the same."""

from __future__ import annotations

import mmap
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fleet.bundles.manifest import Bundle
from fleet.errors import BundleError

Table = npt.NDArray[np.floating[Any]]

EMBEDDING: Final = "edge/embedding.npy"
LM_HEAD: Final = "edge/lm_head.npy"


def load_tables(bundle: Bundle) -> tuple[Table, Table]:
    """The embedding and the LM head's weights, one and the same array for a model that ties them; see `load_table`."""
    embedding = load_table(bundle, EMBEDDING)
    untied = any(entry.path == LM_HEAD for entry in bundle.manifest.files)
    return embedding, load_table(bundle, LM_HEAD) if untied else embedding


def load_table(bundle: Bundle, name: str) -> Table:
    """A table [vocab, hidden] in float16 or float32, mapped into memory and not read.

    Raises:
        BundleError: the bundle has no such file, or it holds something else.
    """
    model = bundle.manifest.model
    path = bundle.path(name)
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BundleError(
            f"{path} is no table of NumPy ({error}); export the bundle again"
        ) from None
    expected = model.vocab_size, model.hidden_size
    if mapped.shape != expected or mapped.dtype not in (np.float16, np.float32):
        raise BundleError(
            f"{path}: expected floats {expected}, got {mapped.dtype} {mapped.shape}; export the bundle again"
        )
    mapped.base.madvise(
        mmap.MADV_RANDOM
    )  # else the kernel maps the neighbours of each row that is read as well
    table: Table = np.asarray(mapped)
    return table
