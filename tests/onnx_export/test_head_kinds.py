"""Every kind of exit head gives the same values on the device and in PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.whole_model import WholeModel
from fleet.bundles.verify import verify_bundle
from fleet.errors import ExportError
from fleet.graphs.cascade import Cascade
from fleet.graphs.partition import Partition
from fleet.protocol.modes import CLOUD
from fleet.protocol.prompt import PromptRequest
from onnx_export import parity
from onnx_export.bundle import export_bundle
from onnx_export.config import QUANTIZATIONS, ExportConfig, Quantization
from onnx_export.heads import ExitHead, HeadKind, load_heads
from tests.conftest import MakeTinyBundle
from tests.onnx_export.traces import shared_traces
from tests.system.memory_fleet import memory_fleet
from tests.tiny import VOCAB_SIZE, make_tiny_checkpoint, make_tiny_heads

EXITS = (1, 3)
KINDS: tuple[HeadKind, ...] = get_args(HeadKind)
TOKENS: list[int] = np.random.default_rng(3).integers(0, VOCAB_SIZE, 12).tolist()


@pytest.fixture(scope="module", autouse=True)
def _shared_traces() -> Iterator[None]:
    with shared_traces():
        yield


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()


def run_layers(model: Any, layers: list[nn.Module]) -> Tensor:
    """Run Hugging Face's own decoder with these layers and no norm on `TOKENS`: [s, hidden]."""
    decoder = copy.deepcopy(model.model)
    decoder.layers = nn.ModuleList(layers)
    decoder.norm = nn.Identity()
    decoder.config.num_hidden_layers = len(layers)
    with torch.no_grad():
        out: Tensor = decoder(torch.tensor([TOKENS]), use_cache=False).last_hidden_state[0]
    return out


def head_logprobs(model: Any, head: ExitHead, exit_layer: int) -> Tensor:
    """Return the exit's log-probabilities at each of `TOKENS`: [s, vocab]."""
    own = [] if head.layer is None else [head.layer]
    with torch.no_grad():
        out: Tensor = model.lm_head(
            head(run_layers(model, [*model.model.layers[:exit_layer], *own]))
        ).log_softmax(-1)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_every_exit_equals_pytorch_at_every_step(
    make_tiny_bundle: MakeTinyBundle,
    model: Any,
    tiny_checkpoint: Path,
    tmp_path: Path,
    kind: HeadKind,
) -> None:
    bundle = make_tiny_bundle(EXITS, kind=kind)
    assert bundle.manifest.exit_head == kind
    heads = load_heads(
        make_tiny_heads(tmp_path / "heads", tiny_checkpoint, kind=kind), EXITS, model
    ).heads
    expected = [head_logprobs(model, heads[layer], layer).numpy() for layer in EXITS]
    partition = Partition(bundle, num_threads=1)
    cascade = Cascade(partition, 16)
    for position, token in enumerate(TOKENS):
        cascade.append([token])
        for block, logprobs in enumerate(expected):
            candidates = cascade.run(block)
            wanted = np.sort(logprobs[position])[::-1][: len(candidates.logprobs)]
            np.testing.assert_allclose(candidates.logprobs, wanted, atol=1e-4)
            np.testing.assert_allclose(
                logprobs[position][candidates.token_ids], candidates.logprobs, atol=1e-4
            )
    for block, layer in enumerate(EXITS):
        states = run_layers(model, list(model.model.layers[:layer])).numpy()
        assert parity.relative_error(cascade.hidden_states(block, 0), states) < 1e-4
        own = int(kind == "block")
        assert len(cascade.caches(block)) == 2 * (
            bundle.manifest.blocks[block][1] - bundle.manifest.blocks[block][0] + own
        )


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_with_heads_of_every_kind_is_good(
    make_tiny_bundle: MakeTinyBundle, kind: HeadKind, quantization: str
) -> None:
    bundle = make_tiny_bundle(EXITS, None, None, quantization, kind)
    verdict = verify_bundle(bundle.folder)
    assert (verdict.findings, verdict.notes) == ((), ())
    if kind != "block":  # its layer is quantised as well; the rest of a head is float32
        assert max(bundle.manifest.parity[f"exit_hidden.{layer}"] for layer in EXITS) < 1e-5


@pytest.mark.parametrize("quantization", ["int8", "balanced", "int4"])
def test_the_layer_of_a_block_head_is_quantised(
    make_tiny_bundle: MakeTinyBundle, quantization: Quantization
) -> None:
    graph = onnx.load(
        make_tiny_bundle(EXITS, None, None, quantization, "block").path("edge/block_0.onnx")
    ).graph
    operators = [node.op_type for node in graph.node]
    assert operators.count("GroupQueryAttention") == 2
    assert operators.count("MatMulNBits") == 2 * 4
    assert "MatMul" not in operators


def test_block_heads_that_are_off_leave_the_whole_models_answer(
    make_tiny_bundle: MakeTinyBundle,
) -> None:
    bundle = make_tiny_bundle(EXITS, kind="block")
    with memory_fleet() as fleet:
        fleet.start_worker(bundle)
        fleet.start_device(bundle)
        answer = fleet.ask(
            PromptRequest(prompt="How warm is it?", threshold=1.0, max_new_tokens=16)
        )
    assert answer.token_ids == WholeModel(bundle, num_threads=1).generate("How warm is it?", 16)
    assert answer.sources == {CLOUD: len(answer.token_ids)}


def test_a_block_head_that_was_corrupted_in_the_graph_fails_the_export(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    path = tmp_path / ".bundle.partial" / "edge" / "block_0.onnx"

    def corrupt(line: str) -> None:
        if line.startswith("comparing"):
            graph = onnx.load(path)
            tensor = next(
                t
                for t in graph.graph.initializer
                if t.name.startswith("head.layer") and "norm" in t.name
            )
            tensor.CopyFrom(
                numpy_helper.from_array(1.1 * numpy_helper.to_array(tensor), tensor.name)
            )
            onnx.save_model(graph, path)

    heads = make_tiny_heads(tmp_path / "heads", tiny_checkpoint, kind="block")
    with pytest.raises(ExportError, match=r"exit_hidden\.1 is"):
        export_bundle(
            ExportConfig(
                out=tmp_path / "bundle",
                exits=(1,),
                model=str(tiny_checkpoint),
                heads=heads,
                quantization="fp32",
            ),
            corrupt,
        )
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_block_heads_of_other_families_equal_pytorch(model_type: str, tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(
        tmp_path / "model", model_type=model_type, head_dim=32, num_hidden_layers=2
    )
    heads = make_tiny_heads(tmp_path / "heads", checkpoint, (1,), "block")
    manifest = export_bundle(
        ExportConfig(
            out=tmp_path / "bundle",
            exits=(1,),
            model=str(checkpoint),
            heads=heads,
            quantization="fp32",
        )
    )
    assert manifest.parity["exit_hidden.1"] < 1e-4
