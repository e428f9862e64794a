"""Linear layers with fewer bits: weights in 8 or 4 bits, activations in bfloat16, by PyTorch's own kernels for CPUs.

Weights alone are quantised, and each row of a batch is computed as it is alone, bit for bit, so a session's logits do
not depend on whom it shares a batch with.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from cloud_broker_worker.config import Weights

GROUP: Final = 32
LANES: Final = 16
"""The 8-bit kernel takes so many inputs at a time, aligned, and checks nothing: a part of them ends the process."""


class Int8Linear(nn.Module):
    """y = x W^T with a scale for each output; x [..., in] float32 -> [..., out] float32; `in` in whole `LANES`."""

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
    """y = x W^T with a scale and an offset for each `GROUP` inputs; x [..., in] float32 -> [..., out] float32.

    `in` comes in whole groups, `out` in whole 16s.
    """

    _weight: Tensor
    _grid: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        groups = weight.reshape(len(weight), -1, GROUP)
        low = groups.amin(-1, keepdim=True)
        scale = ((groups.amax(-1, keepdim=True) - low) / 15).clamp(min=1e-8)
        codes = ((groups - low) / scale).round().clamp(0, 15).to(torch.int32).reshape(weight.shape)
        offset = low + 8 * scale  # the kernel takes (code - 8) * scale + offset
        self.register_buffer("_weight", torch._convert_weight_to_int4pack_for_cpu(codes, 1))
        self.register_buffer("_grid", torch.cat((scale, offset), -1).transpose(0, 1).contiguous().bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        out: Tensor = torch._weight_int4pack_mm_for_cpu(rows, self._weight, GROUP, self._grid)
        return out.float().reshape(*x.shape[:-1], out.shape[-1])


def quantize(model: Any, weights: Weights) -> None:
    """Puts a model's linear layers into fewer bits, in place. The LM head, and what 4 bits cannot hold, takes 8.

    A layer with a bias, or whose inputs do not come in whole `LANES`, stays as it is.
    """
    if weights == "float32":
        return
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or getattr(module, "bias", None) is not None:
            continue
        if module.in_features % LANES:
            continue
        fits_int4 = module.in_features % GROUP == 0 and module.out_features % 16 == 0
        kind = Int4Linear if weights == "int4" and fits_int4 and name != "lm_head" else Int8Linear
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, kind(module.weight.detach()))
