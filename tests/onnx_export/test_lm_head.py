"""The LM head's two steps give what one exact step gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from fleet.bundles.manifest import ModelInfo
from onnx_export.fusion import Graph, fuse_graph
from onnx_export.partition import GROUP_SIZE, best_ids, export_lm_head
from onnx_export.quantize import quantize_preview

HIDDEN = 64
VOCAB = 16384
TOP_K = 8


@pytest.mark.parametrize(
    ("n", "k"), [(GROUP_SIZE * 40, 16), (GROUP_SIZE * 40, 39), (1000, 64), (GROUP_SIZE * 8, 8)]
)
def test_the_best_are_found_group_by_group(n: int, k: int) -> None:
    values = torch.randn(3, n, generator=torch.Generator().manual_seed(3))
    best = best_ids(values, k)
    for row, ids in zip(values, best, strict=True):
        assert set(ids.tolist()) == set(row.topk(k).indices.tolist())


def test_a_coarse_choice_and_exact_logits_give_the_exact_candidates() -> None:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator)
    info: Any = ModelInfo(
        name="m",
        architecture="M",
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=HIDDEN,
        vocab_size=VOCAB,
        max_positions=64,
        eos_token_ids=(0,),
    )
    model = export_lm_head(info, TOP_K, torch.float16)
    graph = fuse_graph(Graph(model, {"lm_head.weight": lambda: weight}))
    quantized = quantize_preview(graph, "balanced").to_model().SerializeToString()
    session = ort.InferenceSession(quantized, providers=["CPUExecutionProvider"])
    table = weight.half()
    for _ in range(20):
        hidden = torch.randn(1, HIDDEN, generator=generator) * 0.6
        ids, logprobs, confidence = session.run(
            None, {"exit_hidden": hidden.numpy(), "table": table.numpy()}
        )
        exact = (hidden @ table.float().T).log_softmax(-1)[0]
        expected = exact.topk(TOP_K)
        np.testing.assert_array_equal(ids[0, :4], expected.indices.numpy()[:4])
        np.testing.assert_allclose(
            logprobs[0], exact.numpy()[ids[0]], atol=0.05
        )  # the others' share is coarse
        np.testing.assert_allclose(np.diff(logprobs[0]), np.diff(exact.numpy()[ids[0]]), atol=1e-4)
        np.testing.assert_allclose(confidence[0], exact.max().exp().item(), rtol=0.05)
