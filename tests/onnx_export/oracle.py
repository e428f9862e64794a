"""A second opinion on a model's logits: the ONNX graph that optimum exports, without our code."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def optimum_logits(checkpoint: Path, folder: Path, token_ids: Sequence[int]) -> Tensor:
    """Return the logits [n, vocab] after each of n tokens; the graph is written into `folder`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optimum traces with the older exporter of PyTorch
        from optimum.exporters.onnx import main_export
        from optimum.onnxruntime import ORTModelForCausalLM

        main_export(str(checkpoint), folder, task="text-generation", do_validation=False)
        model = ORTModelForCausalLM.from_pretrained(folder, use_cache=False)
        inputs = torch.tensor([token_ids])
        logits: Tensor = model(inputs, attention_mask=torch.ones_like(inputs)).logits[0]
    return logits
