"""The weights of a GGUF file, read by range and converted to float32 one at a time.

Names, and the order of a weight's rows, are those to which transformers converts a GGUF file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFReader,
    ReaderTensor,
    dequantize,
    get_tensor_name_map,
)
from torch import Tensor
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from onnx_export.weights import TensorSpec

ARCHITECTURE: Final = "general.architecture"
ROPE_FACTORS: Final = "rope_"
"""The beginning of the names of tensors that scale the rotary embedding."""
UNSCALED: Final = {
    "scaling.type": ("none", "linear"),
    "scaling.factor": (1.0, 0.0),
    "scale_linear": (1.0, 0.0),
}
"""Values of metadata that scale nothing; the type `linear` is one of a factor."""
UNKNOWN_TYPE: Final = re.compile(r"\S*?(\d+)\)? is not a valid GGMLQuantizationType")
READER_ERRORS: Final = (ValueError, IndexError, KeyError, OverflowError)


class StoredTensor(NamedTuple):
    """A tensor's name in the file, its type, its place and its size."""

    name: str
    kind: GGMLQuantizationType
    offset: int
    num_bytes: int


def open_gguf(path: Path) -> GGUFReader:
    """Return the reader of a GGUF file whose tensors can be converted.

    Raises:
        OSError, ValueError: it cannot be read, is no whole GGUF file, or has a tensor that cannot
            be converted.
    """
    try:
        reader = GGUFReader(path)
        reader.fields[ARCHITECTURE].contents()
    except READER_ERRORS as error:
        reason = UNKNOWN_TYPE.sub(r"a tensor has the unknown type \1", str(error))
        raise ValueError(f"{path} is no whole GGUF file of a known form: {reason}") from None
    for tensor in reader.tensors:
        check_tensor(path, tensor)
    check_rotary_scaling(path, reader)
    return reader


def check_rotary_scaling(path: Path, reader: GGUFReader) -> None:
    """Raise ValueError for metadata that scale the rotary embedding.

    transformers leaves them out, as it does the tensors, which would change the model.
    """
    architecture = reader.fields[ARCHITECTURE].contents()
    for name, unscaled in UNSCALED.items():
        key = f"{architecture}.rope.{name}"
        field = reader.fields.get(key)
        value = field.contents() if field else unscaled[0]
        if value not in unscaled:
            raise ValueError(
                f"{path}: {key} is {value!r}: a scaling of the rotary embedding is not read from "
                "GGUF files; give the model as safetensors"
            )


def check_tensor(path: Path, tensor: ReaderTensor) -> None:
    """Raise ValueError unless a tensor is of a type that can be converted, and is no rope scaling.

    transformers leaves out scalings, which would change the model.
    """
    if tensor.name.startswith(ROPE_FACTORS):
        raise ValueError(
            f"{path} has a rotary scaling, {tensor.name}, which is not read from GGUF files; "
            "give the model as safetensors"
        )
    _, block_bytes = GGML_QUANT_SIZES[tensor.tensor_type]
    try:
        dequantize(np.zeros((1, block_bytes), np.uint8), tensor.tensor_type)
    except NotImplementedError:
        raise ValueError(
            f"{path}: {tensor.name} has the type {tensor.tensor_type.name}, which cannot be "
            "converted; expected a type such as F16, Q8_0 or Q4_K"
        ) from None


def model_names(path: Path, architecture: str, skeleton: Any) -> dict[str, str]:
    """Return the names of a transformers model's weights by those in a GGUF file.

    Raises:
        ValueError: the architecture is not known.
    """
    known = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise ValueError(f"{path} is of the architecture {architecture}, which is not known")
    stems = get_tensor_name_map(known[architecture], skeleton.config.num_hidden_layers)
    names: dict[str, str] = {}
    for name in skeleton.state_dict():
        stem, _, kind = name.rpartition(".")
        names[f"{stems.get_name(stem)}.{kind}"] = name
    return names


class GgufWeights:
    """The weights of a model in a GGUF file, in float32."""

    def __init__(self, path: Path, skeleton: Any) -> None:
        """Read the file's header; `skeleton` is the transformers model, without values.

        Raises:
            OSError, ValueError: as :func:`open_gguf`.
        """
        self._path = path
        reader = open_gguf(path)
        architecture = reader.fields[ARCHITECTURE].contents()
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        self._processor = processor(config=skeleton.config.to_dict())
        names = model_names(path, architecture, skeleton)
        self._tensors: dict[str, StoredTensor] = {}
        self.specs: dict[str, TensorSpec] = {}
        for tensor in reader.tensors:
            name = names.get(tensor.name, tensor.name)
            # Plain numbers, because views of the file would keep it mapped.
            self._tensors[name] = StoredTensor(
                tensor.name, tensor.tensor_type, int(tensor.data_offset), int(tensor.n_bytes)
            )
            shape = tuple(int(size) for size in reversed(tensor.shape))
            self.specs[name] = TensorSpec(torch.float32, shape)

    def read(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        stored = np.fromfile(self._path, np.uint8, count=tensor.num_bytes, offset=tensor.offset)
        if len(stored) != tensor.num_bytes:
            raise ValueError(f"{self._path}: {tensor.name} ends early; the file was altered")
        rows = stored.reshape(*self.specs[name].shape[:-1], -1)
        values = dequantize(rows, tensor.kind)
        weights = self._processor.process(weights=values, name=tensor.name).weights
        if not np.isfinite(weights).all():
            raise ValueError(
                f"{self._path}: {tensor.name} has values that are infinite or not a number"
            )
        return torch.from_numpy(np.ascontiguousarray(weights, np.float32))
