"""The exported graphs compute what PyTorch computes."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from rich.console import Console
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM

from fleet.bundles.manifest import Bundle
from fleet.errors import ExportError
from onnx_export import parity
from onnx_export.bundle import export_bundle
from onnx_export.config import QUANTIZATIONS, ExportConfig, Quantization
from onnx_export.exact_chunks import PAIR
from onnx_export.heads import load_heads
from onnx_export.quantize import INT8_COMPUTE
from onnx_export.report import parity_table
from tests.conftest import MakeTinyBundle
from tests.tiny import VOCAB_SIZE, make_tiny_tokenizer

EXITS = (1, 2, 3)
TOKEN_IDS = np.random.default_rng(7).integers(0, VOCAB_SIZE, (1, 24))


def load_tiny(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def reference(folder: Path) -> tuple[torch.Tensor, ...]:
    """Return hidden states [1, s, hidden] after the embedding and after each layer."""
    with torch.no_grad():
        states: tuple[torch.Tensor, ...] = (
            load_tiny(folder)
            .model(torch.from_numpy(TOKEN_IDS), output_hidden_states=True, use_cache=False)
            .hidden_states
        )
    return states


def embedded(bundle: Bundle) -> parity.Floats:
    return parity.embed_tokens(bundle.folder / "edge", TOKEN_IDS)


def run_blocks(bundle: Bundle, chunks: list[int]) -> list[parity.Floats]:
    """Return hidden states after each block; the tokens are fed in chunks of these sizes."""
    bounds = np.cumsum(chunks)[:-1]
    inputs = np.split(embedded(bundle), bounds, axis=1)
    outputs = []
    for i in range(len(bundle.manifest.exits)):
        block = parity.BlockRunner(
            bundle.path(f"edge/block_{i}.onnx"), bundle.manifest.model, TOKEN_IDS.shape[1]
        )
        inputs = [block.run(chunk)[0] for chunk in inputs]
        outputs.append(np.concatenate(inputs, axis=1))
    return outputs


def test_every_exit_of_the_fp32_graphs_equals_pytorch(
    make_tiny_bundle: MakeTinyBundle, tiny_checkpoint: Path
) -> None:
    states = reference(tiny_checkpoint)
    outputs = run_blocks(make_tiny_bundle(EXITS), [24])
    for layer, output in zip(EXITS, outputs, strict=True):
        assert parity.relative_error(output, states[layer].numpy()) < 1e-4


@pytest.mark.parametrize("chunks", [[1] * 24, [8, 1, 1, 5, 9]])
def test_chunks_of_any_sizes_give_what_one_chunk_gives(
    make_tiny_bundle: MakeTinyBundle, chunks: list[int]
) -> None:
    bundle = make_tiny_bundle(EXITS)
    for one, many in zip(run_blocks(bundle, [24]), run_blocks(bundle, chunks), strict=True):
        assert parity.relative_error(many, one) < 1e-4


def test_a_rewritten_position_leaves_nothing_of_the_old_one(tiny_bundle: Bundle) -> None:
    block = parity.BlockRunner(
        tiny_bundle.path("edge/block_0.onnx"), tiny_bundle.manifest.model, 24
    )
    inputs = embedded(tiny_bundle)
    expected = block.run(inputs[:, :10])[0]
    block.length = 4
    again = block.run(inputs[:, 4:10])[0]
    assert parity.relative_error(again, expected[:, 4:]) < 1e-4


def test_the_lm_head_gives_the_best_tokens_of_pytorch_first(
    make_tiny_bundle: MakeTinyBundle, tiny_checkpoint: Path, tiny_heads: Path
) -> None:
    bundle = make_tiny_bundle(EXITS)
    model = load_tiny(tiny_checkpoint)
    heads = load_heads(tiny_heads, EXITS, model).heads
    state = reference(tiny_checkpoint)[1]
    block = parity.BlockRunner(bundle.path("edge/block_0.onnx"), bundle.manifest.model, 24)
    exit_hidden = block.run(embedded(bundle))[1][-1:]
    lm_head = parity.LmHeadGraph(bundle.folder / "edge")
    inputs = {"exit_hidden": exit_hidden, "table": lm_head.table}
    top_ids, logprobs, confidence = lm_head.session.run(None, inputs)
    with torch.no_grad():
        exact = model.lm_head(heads[1](state[:, -1])).log_softmax(-1)[0]
    expected = exact.topk(bundle.manifest.top_k)
    np.testing.assert_array_equal(top_ids[0], expected.indices.numpy())
    np.testing.assert_allclose(logprobs[0], expected.values.numpy(), atol=1e-4)
    np.testing.assert_allclose(confidence, [exact.max().exp()], rtol=1e-4)


def test_the_cloud_partition_continues_where_the_edge_stops(
    make_tiny_bundle: MakeTinyBundle, tiny_checkpoint: Path
) -> None:
    bundle = make_tiny_bundle((1, 2), None, 1)
    folder = bundle.folder / "cloud"
    cloud = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder), attn_implementation="eager"
    ).eval()
    missing, unexpected = cloud.load_state_dict(
        load_file(folder / "model.safetensors"), strict=False
    )
    with torch.no_grad():
        logits = cloud(inputs_embeds=reference(tiny_checkpoint)[1]).logits
        expected = load_tiny(tiny_checkpoint)(torch.from_numpy(TOKEN_IDS)).logits
    assert (missing, unexpected) == (["model.embed_tokens.weight"], [])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("quantization", "bits"), [("int8", 8), ("balanced", 4), ("int4", 4)])
def test_every_product_of_a_block_is_quantised_and_the_tables_are_fp16(
    make_tiny_bundle: MakeTinyBundle, quantization: Quantization, bits: int
) -> None:
    bundle = make_tiny_bundle((1, 2), None, None, quantization)
    for name, expected in (
        ("edge/block_0.onnx", bits),
        ("edge/block_1.onnx", bits),
        ("edge/lm_head.onnx", 4),
    ):
        nodes = list(onnx.load(bundle.path(name)).graph.node)
        assert [attribute(node, "bits") for node in nodes if node.op_type == "MatMulNBits"][:4] == [
            expected
        ] * (4 if "block" in name else 1)
        assert not [node for node in nodes if node.op_type == "MatMul" and "block" in name]
    assert np.load(bundle.path("edge/embedding.npy")).dtype == np.float16


def test_query_key_and_value_of_balanced_multiply_a_pair_of_inputs(
    make_tiny_bundle: MakeTinyBundle,
) -> None:
    nodes = onnx.load(
        make_tiny_bundle((1, 2), None, None, "balanced").path("edge/block_0.onnx")
    ).graph.node
    products = [node for node in nodes if node.op_type == "MatMulNBits"]
    assert {attribute(node, "accuracy_level") for node in products} == {INT8_COMPUTE}
    assert [node.input[0].endswith(PAIR) for node in products] == [True, False, False, False]


@pytest.mark.parametrize("quantization", ["int8", "balanced", "int4"])
def test_a_chunk_has_the_bits_of_single_positions(
    make_tiny_bundle: MakeTinyBundle, quantization: Quantization
) -> None:
    figures = make_tiny_bundle((1, 2), None, None, quantization).manifest.parity
    assert (figures["steps.1"], figures["steps.2"]) == (0, 0)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_block_and_the_lm_head_give_the_exit_of_each_position(
    make_tiny_bundle: MakeTinyBundle, quantization: Quantization
) -> None:
    bundle = make_tiny_bundle((1, 2), None, None, quantization)
    block = parity.BlockRunner(bundle.path("edge/block_0.onnx"), bundle.manifest.model, 24)
    lm_head = parity.LmHeadGraph(bundle.folder / "edge")
    x = embedded(bundle)
    exit_hidden = block.run(x)[1]
    np.testing.assert_allclose(exit_hidden, block.step(x)[1], rtol=1e-4, atol=1e-5)
    names = ["top_ids", "top_logprobs", "confidence"]
    inputs = {"exit_hidden": exit_hidden, "table": lm_head.table}
    ids, logprobs, confidence = lm_head.session.run(names, inputs)
    expected_ids, expected_logprobs = lm_head.run(exit_hidden)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(logprobs, expected_logprobs, atol=1e-5)
    np.testing.assert_allclose(confidence, np.exp(expected_logprobs[:, 0]), rtol=1e-5)


def attribute(node: onnx.NodeProto, name: str) -> int:
    return int(next(attribute.i for attribute in node.attribute if attribute.name == name))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_manifest_has_the_parity_of_the_graphs(
    make_tiny_bundle: MakeTinyBundle, quantization: Quantization
) -> None:
    figures = make_tiny_bundle((1, 2), None, None, quantization).manifest.parity
    kinds = ("hidden", "steps", "exit_hidden", "logprob", "top1", "same_as_pytorch")
    assert set(figures) == {
        *(f"{kind}.{layer}" for kind in kinds for layer in (1, 2)),
        "lm_head.logprob",
        "lm_head.top1",
        "same_as_pytorch.whole",
        "bits",
    }
    parity.check_parity(figures, parity.parity_limits(quantization, "linear", deepest_exit=2))


def test_figures_outside_their_limits_fail_the_export_by_name() -> None:
    figures = {"hidden.1": 1e-6, "hidden.2": 0.01, "same_as_pytorch.2": 0.5, "lm_head.top1": 1.0}
    with pytest.raises(
        ExportError,
        match=r"hidden\.2 is 0\.01, expected at most 0\.0001; same_as_pytorch\.2 is 0\.5",
    ) as raised:
        parity.check_parity(figures, parity.parity_limits("fp32", "linear"))
    assert "hidden.1" not in str(raised.value)


def test_hidden_states_that_float16_cannot_hold_fail_the_export() -> None:
    states = np.array([[1.0, -65504.0]], np.float32)
    parity.check_float16_range(states, "4")
    with pytest.raises(ExportError, match=r"after layer 4 reach 131008, but .* ends at 65504"):
        parity.check_float16_range(states * 2, "4")


@pytest.mark.parametrize("name", ["hidden.1", "same_as_pytorch.1", "lm_head.logprob"])
def test_graphs_that_give_no_number_fail_the_export(name: str) -> None:
    with pytest.raises(ExportError, match="differ from PyTorch"):
        parity.check_parity({name: float("nan")}, parity.parity_limits("int8", "linear"))


def zero_rows(weight: Any, _other: Any) -> None:
    weight[:4] = 0


def scale_rows(weight: Any, _other: Any) -> None:
    weight[8:12] *= 1.02


def swap(weight: Any, other: Any) -> None:
    weight[:], other[:] = other.copy(), weight.copy()


def flip_one(weight: Any, _other: Any) -> None:
    weight[3, 3] = -weight[3, 3]


@pytest.mark.parametrize("corrupt", [zero_rows, scale_rows, swap, flip_one])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_head_that_was_corrupted_in_the_graph_fails_the_export(
    quantization: Quantization,
    corrupt: Callable[[Any, Any], None],
    tmp_path: Path,
    tiny_checkpoint: Path,
    tiny_heads: Path,
) -> None:
    folder = tmp_path / ".bundle.partial" / "edge"

    def corrupt_before_the_comparison(line: str) -> None:
        if line.startswith("comparing"):
            graphs = [onnx.load(folder / f"block_{i}.onnx") for i in range(2)]
            tensors = [
                next(t for t in graph.graph.initializer if t.name == "head/head.adapter.weight")
                for graph in graphs
            ]
            weights = [numpy_helper.to_array(tensor).copy() for tensor in tensors]
            corrupt(*weights)
            for i, graph in enumerate(graphs):
                tensors[i].CopyFrom(numpy_helper.from_array(weights[i], tensors[i].name))
                onnx.save_model(graph, folder / f"block_{i}.onnx")

    config = ExportConfig(
        out=tmp_path / "bundle",
        exits=(1, 2),
        model=str(tiny_checkpoint),
        heads=tiny_heads,
        quantization=quantization,
    )
    with pytest.raises(ExportError, match=r"exit_hidden\.1 is .*, expected at most 0\.0001"):
        export_bundle(config, corrupt_before_the_comparison)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_an_lm_head_that_was_corrupted_in_the_graph_fails_the_export(
    quantization: Quantization, tmp_path: Path, tiny_checkpoint: Path, tiny_heads: Path
) -> None:
    path = tmp_path / ".bundle.partial" / "edge" / "lm_head.onnx"

    def lose_tokens(line: str) -> None:
        if line.startswith("comparing"):
            graph = onnx.load(path)
            tensor = max(graph.graph.initializer, key=lambda tensor: len(tensor.raw_data))
            weight = numpy_helper.to_array(tensor).copy()
            if quantization == "fp32":
                weight[:, 100:140] = 0
            else:
                weight[100:140] = 0x88  # its zero
            tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
            onnx.save_model(graph, path)

    config = ExportConfig(
        out=tmp_path / "bundle",
        exits=(1, 2),
        model=str(tiny_checkpoint),
        heads=tiny_heads,
        quantization=quantization,
    )
    with pytest.raises(ExportError, match=r"lm_head\.logprob is"):
        export_bundle(config, lose_tokens)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_token_counts_unless_pytorch_gives_it_the_same_probability() -> None:
    logprobs = np.log(np.array([[0.5, 0.499, 0.001], [0.5, 0.3, 0.2]], np.float32))
    assert parity.share_of_best(np.array([[0], [0]]), logprobs) == 1.0
    assert parity.share_of_best(np.array([[1], [0]]), logprobs) == 1.0
    assert parity.share_of_best(np.array([[2], [1]]), logprobs) == 0.0


def test_the_text_is_cut_into_sequences_that_fit_the_model() -> None:
    windows = parity.text_windows(make_tiny_tokenizer(), 100)
    assert [window.shape for window in windows] == [(1, 100)] * 5 + [(1, 12)]
    assert make_tiny_tokenizer().decode(windows[0][0]).startswith("A lighthouse keeper")


def test_each_sequence_begins_with_the_tokens_that_begin_a_text() -> None:
    tokenizer = make_tiny_tokenizer()
    start = ("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[start]
    )
    windows = parity.text_windows(tokenizer, 100)
    assert [window.shape for window in windows] == [(1, 100)] * 5 + [(1, 12)]
    assert [window[0, 0] for window in windows] == [start[1]] * 6
    assert tokenizer.decode(windows[0][0, 1:]).startswith("A lighthouse keeper")


def test_the_report_lists_every_figure_with_its_limit(make_tiny_bundle: MakeTinyBundle) -> None:
    figures = make_tiny_bundle((1, 2)).manifest.parity
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(parity_table(figures, parity.parity_limits("fp32", "linear")))
    text = console.export_text()
    assert [name for name in figures if name not in text] == []
    assert "at most 0.0001" in text
