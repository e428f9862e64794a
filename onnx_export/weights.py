"""Weights of a model by name, read one at a time in the type in which they are stored."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import msgspec
import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from fleet.bundles.tensor_file import TensorFile
from fleet.utils.text_files import check_no_pointer
from fleet.utils.validation import JSON_ERRORS

DTYPES: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
RANDOM_GAIN: Final = 0.5
EMBEDDING: Final = "model.embed_tokens.weight"


class TensorSpec(NamedTuple):
    """The type and the shape of a stored weight."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_weights(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """The size of the stored weight."""
        return self.num_weights * self.dtype.itemsize


class ShardIndex(msgspec.Struct):
    """The file that names the shard of each weight."""

    weight_map: dict[str, str]


class WeightSource(Protocol):
    """A model's weights. The caller of `read` drops a weight before it reads the next one."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The type and the shape of each weight, by name."""
        ...

    def read(self, name: str) -> Tensor:
        """Return one weight in its stored type.

        Raises:
            OSError, ValueError: it cannot be read, or holds values that are not finite.
        """
        ...


class CheckpointWeights:
    """The weights in safetensors files, each of which has some of them."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Read the files' headers; raise OSError or ValueError when one is missing or damaged."""
        self.specs: dict[str, TensorSpec] = {}
        self._paths: dict[str, Path] = {}
        for path in paths:
            with TensorFile(path) as file:
                for name, entry in file.entries.items():
                    self.specs[name] = TensorSpec(DTYPES[entry.dtype], entry.shape)
                    self._paths[name] = path

    def read(self, name: str) -> Tensor:
        with TensorFile(self._paths[name]) as file:
            return torch.from_numpy(file.read(name)).view(self.specs[name].dtype)


@dataclass(frozen=True)
class LoadedWeights:
    """Weights in memory."""

    tensors: Mapping[str, Tensor]

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {
            name: TensorSpec(tensor.dtype, tuple(tensor.shape))
            for name, tensor in self.tensors.items()
        }

    def read(self, name: str) -> Tensor:
        tensor = self.tensors[name].detach()
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has values that are infinite or not a number")
        return tensor


@dataclass(frozen=True)
class RandomWeights:
    """Random weights of given shapes, made when they are read, for measurements of large models.

    Vectors are 1: they scale, in norms. A layer adds little to the embedding, because the errors
    of its quantisation would otherwise grow from layer to layer beyond the limits of an export.
    """

    shapes: Mapping[str, tuple[int, ...]]
    seed: int = 0
    dtype: torch.dtype = torch.bfloat16

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: TensorSpec(self.dtype, shape) for name, shape in self.shapes.items()}

    def read(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=self.dtype)
        generator = self._generator(name)
        scale = 1.0 if name == EMBEDDING else RANDOM_GAIN / math.sqrt(shape[1])
        return torch.empty(shape, dtype=self.dtype).normal_(0, scale, generator=generator)

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


def weight_files(source: str) -> list[Path]:
    """Return the safetensors files of a checkpoint, a folder or a name on the hub.

    The list is empty when it has none.

    Raises:
        OSError: a file that the index names is missing.
        ValueError: the index is damaged.
    """
    whole = cached_file(source, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    if whole is not None:
        return [Path(whole)]
    index = cached_file(
        source, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False
    )
    if index is None:
        return []
    check_no_pointer(Path(index))
    try:
        weight_map = msgspec.json.decode(Path(index).read_bytes(), type=ShardIndex).weight_map
    except JSON_ERRORS as error:
        raise ValueError(f"{index} is no index of weights: {error}") from None
    return [Path(cached_file(source, name)) for name in sorted(set(weight_map.values()))]
