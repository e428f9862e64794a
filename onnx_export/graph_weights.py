"""Weights of a graph: read when they are needed, written to a file next to the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data
from torch import Tensor

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Read = Callable[[], Tensor]
Store = Callable[[str, Array], TensorProto]

PIECE_WEIGHTS: Final = 1 << 18  # float32 pieces that stay in a core's cache
MIN_EXTERNAL_BYTES: Final = 1024
ALIGNMENT: Final = 64


@dataclass(frozen=True)
class Weight:
    """A weight of a graph, joined along the last axis from stored ones.

    `is_transposed`: the stored ones are transposed. `names` are those of the parts.
    """

    shape: tuple[int, ...]
    parts: tuple[Read, ...]
    is_transposed: bool = False
    names: tuple[str, ...] = ()

    def transposed(self) -> Weight:
        """Return the transposed weight."""
        return replace(self, shape=self.shape[::-1], is_transposed=not self.is_transposed)

    def plus(self, offset: float) -> Weight:
        """Return the weight plus a number."""
        parts = tuple(partial(add_offset, read, offset) for read in self.parts)
        return replace(self, parts=parts)

    def pieces(self) -> Iterator[Floats]:
        """Yield the weight in float32, cut along the last axis; one part is read at a time."""
        for read in self.parts:
            tensor = read()
            if not self.is_transposed:
                yield tensor.float().numpy()
                continue
            for rows in tensor.split(max(1, PIECE_WEIGHTS // tensor.shape[1])):
                yield rows.float().numpy().T

    def read(self) -> Floats:
        """Return the whole weight in float32."""
        return np.concatenate(list(self.pieces()), -1)


def add_offset(read: Read, offset: float) -> Tensor:
    """Read a weight and return it plus a number, in float32."""
    return read().float() + offset


def inline(name: str, value: Array) -> TensorProto:
    """Return an initialiser with its value."""
    return numpy_helper.from_array(np.ascontiguousarray(value), name)


@dataclass(frozen=True)
class DataFile:
    """The file of a graph's large weights."""

    path: Path

    def store(self, name: str, value: Array) -> TensorProto:
        """Append a weight to the file and return the initialiser that refers to it."""
        if value.nbytes < MIN_EXTERNAL_BYTES:
            return inline(name, value)
        with self.path.open("ab") as file:
            file.write(bytes(-file.tell() % ALIGNMENT))
            offset = file.tell()
            file.write(np.ascontiguousarray(value).data)
        dtype = helper.np_dtype_to_tensor_dtype(value.dtype)
        tensor = TensorProto(name=name, data_type=dtype, dims=value.shape, raw_data=b"")
        set_external_data(tensor, self.path.name, offset=offset, length=value.nbytes)
        tensor.ClearField("raw_data")
        return tensor
