"""Variants of the Llama layout: scales, caps, windows and norms of some models."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

GEMMA: Final = ("gemma2", "gemma3_text")
"""Models whose layers read the embedding times the square root of its size."""
GEMMA_STATE_SCALE: Final = 64.0


def embedding_scale(config: Any) -> float:
    """Return the factor between a model's embedding and the input of its first layer."""
    scale: float = config.hidden_size**0.5 if config.model_type in GEMMA else 1.0
    return scale


def state_scale(config: Any) -> float:
    """Return the factor between a bundle's hidden states and the model's.

    Those of Gemma exceed float16, in which they are uploaded: 104,000 in Gemma 3 270M. A power of
    two changes no digit.
    """
    return GEMMA_STATE_SCALE if config.model_type in GEMMA else 1.0


def scaled(values: Tensor, scale: float) -> Tensor:
    """Return values times a scale; a scale of 1 leaves no trace in a graph."""
    return values if scale == 1.0 else values * scale


def logit_cap(config: Any) -> float | None:
    """Return the bound of a model's logits (arXiv 2408.00118, section 2), if it has one."""
    cap: float | None = getattr(config, "final_logit_softcapping", None)
    return cap


def attention_window(attention: Any) -> int | None:
    """Return the number of positions that an attention sees, its own included; None for all."""
    owner = attention if hasattr(attention, "sliding_window") else attention.config
    window: int | None = getattr(owner, "sliding_window", None)
    return window


def is_rms_norm(module: nn.Module) -> bool:
    """Return whether a module is an RMS norm of transformers."""
    return type(module).__name__.endswith("RMSNorm")


def norm_epsilon(norm: Any) -> float:
    """Return the epsilon of an RMS norm of transformers."""
    return float(norm.eps if norm_offset(norm) else norm.variance_epsilon)


def norm_offset(norm: Any) -> float:
    """Return the number that an RMS norm of transformers adds to its weight: 1 in Gemma."""
    return 1.0 if type(norm).__name__.startswith("Gemma") else 0.0


def attention_mask(length: int, window: int | None = None) -> Tensor:
    """Return what a layer adds to the scores of positions [0, length): [1, 1, length, length]."""
    lowest = torch.finfo(torch.float32).min
    mask = torch.full((length, length), lowest).triu(1)
    if window is not None:
        mask += torch.full((length, length), lowest).tril(-window)
    return mask[None, None]
