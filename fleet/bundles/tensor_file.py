"""A safetensors file, read by range: a header with the place of each tensor, then their values.

The file is not mapped into memory, because the pages of a mapping count as the process's memory.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from fleet.utils.text_files import check_no_pointer
from fleet.utils.validation import JSON_ERRORS

MAX_HEADER_BYTES: Final = 100_000_000  # by the format's specification
PIECE_BYTES: Final = 1 << 20  # stays in a core's cache while its values are checked
Bits = npt.NDArray[np.unsignedinteger[Any]]


class FloatFormat(NamedTuple):
    """A type of a value: the unsigned integer of its size, and the bits of its exponent.

    A value whose exponent has all bits is infinite or not a number.
    """

    bits: npt.DTypeLike
    exponent: int


FORMATS: Final = {
    "F32": FloatFormat(np.uint32, 0x7F80_0000),
    "BF16": FloatFormat(np.uint16, 0x7F80),
    "F16": FloatFormat(np.uint16, 0x7C00),
}


class TensorEntry(Struct, frozen=True):
    """One tensor's entry in the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class TensorFile:
    """An open file of tensors in float32, bfloat16 or float16. It is a context manager."""

    def __init__(self, path: Path) -> None:
        """Open the file and read its header.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no such file, or a tensor has another type or lies outside of it.
            ConfigError: it is a pointer of Git LFS.
        """
        check_no_pointer(path)
        self._path = path
        self._file = path.open("rb")
        try:
            self.entries = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def _read_header(self) -> dict[str, TensorEntry]:
        num_bytes = self._path.stat().st_size
        prefix = self._file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else num_bytes
        if length > min(MAX_HEADER_BYTES, num_bytes - 8):
            raise ValueError(f"{self._path} is no safetensors file: it has no whole header")
        try:
            header = msgspec.json.decode(self._file.read(length), type=dict[str, Any])
            header.pop("__metadata__", None)
            entries = msgspec.convert(header, dict[str, TensorEntry])
        except JSON_ERRORS as error:
            raise ValueError(f"{self._path} is no safetensors file: {error}") from None
        self._start = 8 + length
        for name, entry in entries.items():
            self._check(name, entry, num_bytes - self._start)
        return entries

    def _check(self, name: str, entry: TensorEntry, num_bytes: int) -> None:
        if entry.dtype not in FORMATS:
            raise ValueError(
                f"{self._path}: {name} has the type {entry.dtype}, "
                f"expected one of {', '.join(FORMATS)}"
            )
        start, stop = entry.data_offsets
        size = math.prod(entry.shape) * np.dtype(FORMATS[entry.dtype].bits).itemsize
        if not 0 <= start <= stop <= num_bytes or stop - start != size:
            raise ValueError(
                f"{self._path}: {name} lies at bytes {start} to {stop} of {num_bytes}, "
                f"expected {size} bytes within the file"
            )

    def read(self, name: str) -> Bits:
        """Read a tensor's values, in their shape, as bits.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file is shorter than it was, or a value is infinite or not a number.
        """
        entry = self.entries[name]
        values = np.empty(entry.shape, FORMATS[entry.dtype].bits)
        flat = values.reshape(-1)
        count = PIECE_BYTES // values.itemsize
        self._file.seek(self._start + entry.data_offsets[0])
        for start in range(0, len(flat), count):
            self._read_piece(name, flat[start : start + count])
        return values

    def check(self, name: str) -> None:
        """Read a tensor without keeping it; raise as `read` does."""
        entry = self.entries[name]
        num_left = math.prod(entry.shape)
        buffer = np.empty(min(PIECE_BYTES, num_left), FORMATS[entry.dtype].bits)
        self._file.seek(self._start + entry.data_offsets[0])
        while num_left:
            piece = buffer[:num_left]
            self._read_piece(name, piece)
            num_left -= len(piece)

    def _read_piece(self, name: str, piece: Bits) -> None:
        """Fill `piece` with the next values of the file, and check that they are finite."""
        if self._file.readinto(piece.data.cast("B")) != piece.nbytes:
            raise ValueError(f"{self._path}: {name} ends early; the file was altered")
        exponent = FORMATS[self.entries[name].dtype].exponent
        if np.bitwise_and(piece, piece.dtype.type(exponent)).max(initial=0) == exponent:
            raise ValueError(f"{self._path}: {name} has values that are infinite or not a number")
