"""The worker's linear layers, by PyTorch's own kernels for CPUs: in float32, or with weights of 8
or 4 bits.

With fewer bits only weights are quantised, activations are in bfloat16, and each row of a batch is
computed as it is alone, bit for bit, so a session's logits do not depend on the rest of the batch.
In float32 they do, by rounding.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from cloud_broker_worker.worker.config import Weights

GROUP: Final = 32
LANES: Final = 16
"""Inputs that the 8-bit kernel reads at a time, aligned; it checks nothing, and any other number
ends the process."""
NUM_CANDIDATES: Final = 32


class PackedLinear(nn.Module):
    """y = x W^T + b in float32, with the weight in oneDNN's layout; x [..., in] float32 -> [...,
    out] float32.

    MKL, which PyTorch calls by default, took two to four times as long for the few rows of a batch
    on the AMD processor where both were measured (ADR 0026).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.num_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self._bias = bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, "none", [], ""
        )
        return out


class Int8Linear(nn.Module):
    """y = x W^T with a scale for each output; x [..., in] float32 -> [..., out] float32.

    `in` is a multiple of `LANES`.
    """

    _weight: Tensor
    _scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        scale = weight.abs().amax(1).clamp(min=1e-8) / 127
        self.register_buffer("_weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("_scale", scale.bfloat16())

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
        groups = weight.reshape(len(weight), -1, GROUP)
        low = groups.amin(-1, keepdim=True)
        scale = ((groups.amax(-1, keepdim=True) - low) / 15).clamp(min=1e-8)
        levels = ((groups - low) / scale).round().clamp(0, 15)
        codes = levels.to(torch.int32).reshape(weight.shape)
        offset = low + 8 * scale  # the kernel computes (code - 8) * scale + offset
        self.register_buffer("_weight", torch._convert_weight_to_int4pack_for_cpu(codes, 1))
        grid = torch.cat((scale, offset), -1).transpose(0, 1)
        self.register_buffer("_grid", grid.contiguous().bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        out: Tensor = torch._weight_int4pack_mm_for_cpu(rows, self._weight, GROUP, self._grid)
        return out.float().reshape(*x.shape[:-1], out.shape[-1])


class TwoStepHead(nn.Module):
    """An LM head of 4 bits that chooses `NUM_CANDIDATES` tokens, and computes their logits again
    with 16 bits.

    The other tokens keep the logits of the 4 bits. The device's LM head works in the same way (ADR
    0010).
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._coarse = Int4Linear(weight)
        self._table = weight.half()
        self._num_candidates = min(NUM_CANDIDATES, len(weight))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [rows, vocab] float32 of x [rows, in] float32."""
        logits: Tensor = self._coarse(x)
        ids = logits.topk(self._num_candidates, sorted=False).indices
        # Not a product of matrices, so that it depends on no other row.
        fine = (self._table[ids].float() * x[:, None]).sum(-1)
        return logits.scatter_(-1, ids, fine)


def prepare(model: Any, weights: Weights) -> None:
    """Replace a model's linear layers by those of this module, in place.

    With fewer bits the LM head runs in two steps. A layer that does not fit 4 bits has 8, and one
    with a bias, or whose number of inputs is no multiple of `LANES`, keeps float32.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _prepared(name, module, weights))


def _prepared(name: str, layer: nn.Linear, weights: Weights) -> nn.Module:
    biased: Tensor | None = getattr(layer, "bias", None)
    weight = layer.weight.detach()
    bias = None if biased is None else biased.detach()
    if weights == "float32" or bias is not None or layer.in_features % LANES:
        has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        return PackedLinear(weight, bias) if has_onednn else layer
    fits_int4 = layer.in_features % GROUP == 0 and layer.out_features % 16 == 0
    if name == "lm_head" and fits_int4:
        return TwoStepHead(weight)
    return Int4Linear(weight) if weights == "int4" and fits_int4 else Int8Linear(weight)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a prepared model's weights that a step reads, without the rows of a few
    candidates.
    """
    packed = sum(m.num_bytes for m in model.modules() if isinstance(m, PackedLinear))
    return packed + sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
