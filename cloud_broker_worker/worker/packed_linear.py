"""The worker's linear layers, by PyTorch's own kernels for CPUs: in float32 or bfloat16, or with
weights of 8 or 4 bits.

With 8 or 4 bits only weights are quantised, activations are in bfloat16, and each row of a batch is
computed as it is alone, bit for bit, so a session's logits do not depend on the rest of the batch.
In float32 and bfloat16 they do, by rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from cloud_broker_worker.worker.config import Weights

GROUP: Final = 32
LANES: Final = 16
"""Inputs that the 8-bit kernel reads at a time, aligned; it checks nothing, and any other number
ends the process."""
NUM_CANDIDATES: Final = 32
LM_HEAD: Final = "lm_head"
PACKED_ROWS: Final = 4096
"""Outputs whose weights are quantised at a time: a multiple of the 4-bit layout's 64."""


class PackedLinear(nn.Module):
    """y = x W^T + b in the weight's type, float32 or bfloat16; x [..., in] float32 -> [..., out]
    float32.

    The weight is in oneDNN's layout, unless PyTorch has no oneDNN for its type, or `is_plain`. MKL,
    which PyTorch calls by default, took two to four times as long for the few rows of a batch on
    the AMD processor where both were measured (ADR 0026).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, is_plain: bool = False) -> None:
        super().__init__()
        self.num_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        self._dtype = weight.dtype
        self._is_packed = not is_plain and has_onednn(weight.dtype)
        if self._is_packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self._weight = weight
        self._bias = bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.to(self._dtype)
        if not self._is_packed:
            return nn.functional.linear(rows, self._weight, self._bias).float()
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self._weight, self._bias, "none", [], ""
        )
        return out.float()


def has_onednn(dtype: torch.dtype) -> bool:
    """Return whether oneDNN multiplies matrices of float32 or bfloat16 on this processor."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.float32:
        return True
    is_supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return is_supported


class Int8Linear(nn.Module):
    """y = x W^T with a scale for each output; x [..., in] float32 -> [..., out] float32.

    `in` is a multiple of `LANES`.
    """

    _weight: Tensor
    _scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        codes, scale = by_rows(weight, self._quantize)
        self.register_buffer("_weight", codes)
        self.register_buffer("_scale", scale)

    @staticmethod
    def _quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = weight.abs().amax(1).clamp(min=1e-8) / 127
        codes = (weight / scale[:, None]).round().to(torch.int8)
        return codes, scale.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        out: Tensor = torch._weight_int8pack_mm(rows, self._weight, self._scale)
        return out.float().reshape(*x.shape[:-1], out.shape[-1])


class Int4Linear(nn.Module):
    """y = x W^T with a scale and an offset for each `GROUP` inputs; x [..., in] float32 -> [...,
    out] float32.

    `in` is a multiple of `GROUP`, `out` of 16.
    """

    _weight: Tensor
    _grid: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        packed, grid = by_rows(weight, self._quantize)
        self.register_buffer("_weight", packed)
        self.register_buffer("_grid", grid.transpose(0, 1).contiguous())

    @staticmethod
    def _quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        groups = weight.reshape(len(weight), -1, GROUP)
        low = groups.amin(-1, keepdim=True)
        scale = ((groups.amax(-1, keepdim=True) - low) / 15).clamp(min=1e-8)
        levels = ((groups - low) / scale).round_().clamp_(0, 15)
        codes = levels.to(torch.int32).reshape(weight.shape)
        offset = low + 8 * scale  # the kernel computes (code - 8) * scale + offset
        packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        return packed, torch.cat((scale, offset), -1).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        out: Tensor = torch._weight_int4pack_mm_for_cpu(rows, self._weight, GROUP, self._grid)
        return out.float().reshape(*x.shape[:-1], out.shape[-1])


def by_rows(
    weight: Tensor, quantize: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Quantise a weight [out, in] in pieces of its outputs in float32, so that little memory is
    needed besides the result.
    """
    pieces = [quantize(piece.float()) for piece in torch.split(weight, PACKED_ROWS)]
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat([first for first, _ in pieces]), torch.cat([second for _, second in pieces])


class TwoStepHead(nn.Module):
    """An LM head that chooses `NUM_CANDIDATES` tokens with `coarse`, and computes their logits
    again with the 16-bit weights `table`, from inputs in float32.

    The other tokens keep the logits of `coarse`. The device's LM head works in the same way (ADR
    0010).
    """

    def __init__(self, coarse: nn.Module, table: Tensor) -> None:
        super().__init__()
        self._coarse = coarse
        self._table = table
        self._num_candidates = min(NUM_CANDIDATES, len(table))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [rows, vocab] float32 of x [rows, in] float32."""
        logits: Tensor = self._coarse(x)
        ids = logits.topk(self._num_candidates, sorted=False).indices
        # Not a product of matrices, so that it depends on no other row.
        fine = (self._table[ids].float() * x[:, None]).sum(-1)
        return logits.scatter_(-1, ids, fine)


def pack_layers(model: Any, weights: Weights, read: Callable[[str], Tensor]) -> None:
    """Replace a model's linear layers by those of this module, in place; `read` gives the weight or
    bias of a name.

    Each layer is read when it is its turn, and freed when it is packed, so that the peak of memory
    is little more than the result. With fewer bits than float32 the LM head runs in two steps. A
    layer that does not fit 4 bits has 8, and one with a bias, or whose number of inputs is no
    multiple of `LANES`, keeps float32.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            bias = read(f"{name}.bias") if module.bias is not None else None
            packed = packed_layer(name, read(f"{name}.weight"), bias, weights)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, packed)


def packed_layer(name: str, weight: Tensor, bias: Tensor | None, weights: Weights) -> nn.Module:
    """Return the layer `name` of y = x W^T + b with weights of this kind."""
    if weights == "bfloat16":
        return _bfloat16_layer(name, weight.bfloat16(), bias)
    num_out, num_in = weight.shape
    if weights == "float32" or bias is not None or num_in % LANES:
        return PackedLinear(weight.float(), None if bias is None else bias.float())
    fits_int4 = num_in % GROUP == 0 and num_out % 16 == 0
    if name == LM_HEAD and fits_int4:
        table = weight if weight.dtype.itemsize == 2 else weight.half()
        return TwoStepHead(Int4Linear(weight), table)
    return Int4Linear(weight) if weights == "int4" and fits_int4 else Int8Linear(weight)


def _bfloat16_layer(name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return a layer in bfloat16. The steps of the LM head share its weights, which are not packed
    for this reason.
    """
    if name == LM_HEAD and bias is None:
        return TwoStepHead(PackedLinear(weight, None, is_plain=True), weight)
    return PackedLinear(weight, None if bias is None else bias.bfloat16())


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a packed model's weights that a step reads, without the rows of a few
    candidates.
    """
    packed = sum(m.num_bytes for m in model.modules() if isinstance(m, PackedLinear))
    return packed + sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
