"""Models of the Llama layout, split between device and worker, equal PyTorch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cloud_broker_worker.worker.upper_layers import Chunk, UpperLayers
from edge_agent.engine.cascade import Cascade
from edge_agent.engine.partition import Partition
from fleet.bundles.manifest import Bundle
from fleet.bundles.verify import verify_bundle
from fleet.errors import ExportError
from onnx_export.architecture import check_model
from onnx_export.bundle import export_bundle
from onnx_export.config import ExportConfig, Quantization
from onnx_export.parity import relative_error
from tests.cloud_broker_worker.worker.conftest import TinyModel
from tests.onnx_export.traces import shared_traces
from tests.tiny import VOCAB_SIZE, make_tiny_checkpoint, make_tiny_tokenizer

EXITS = (2,)
TOKENS: list[int] = np.random.default_rng(5).integers(0, VOCAB_SIZE, 20).tolist()
MODELS: dict[str, dict[str, Any]] = {
    "smollm": {
        "hidden_size": 48,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "intermediate_size": 72,
    },
    "llama": {
        "tie_word_embeddings": False,
        "num_key_value_heads": 4,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mistral": {
        "model_type": "mistral",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "head_dim": 32,
    },
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 1},
    "qwen2.5": {
        "model_type": "qwen2",
        "tie_word_embeddings": False,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-3,
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0, 0, 1], "num_hidden_layers": 4},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3-untied": {
        "model_type": "qwen3",
        "tie_word_embeddings": False,
        "num_key_value_heads": 4,
        "attention_bias": True,
    },
}
LONG_ROPE = {
    "rope_scaling": {
        "type": "longrope",
        "factor": 2.0,
        "short_factor": [1] * 64,
        "long_factor": [1] * 64,
    }
}


@pytest.fixture(scope="module", autouse=True)
def _shared_traces() -> Iterator[None]:
    with shared_traces():
        yield


def export(
    folder: Path,
    checkpoint: Path,
    quantization: Quantization = "fp32",
    exits: tuple[int, ...] = EXITS,
) -> Bundle:
    """Export a bundle whose exits share the final norm, with all tokens as candidates."""
    config = ExportConfig(
        out=folder / "bundle",
        exits=exits,
        model=str(checkpoint),
        exit_head="shared",
        quantization=quantization,
        top_k=VOCAB_SIZE,
    )
    export_bundle(config)
    return Bundle.load(config.out)


@pytest.mark.parametrize("name", MODELS)
def test_device_and_worker_together_are_the_whole_model(name: str, tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "model", **{"num_hidden_layers": 3} | MODELS[name])
    bundle = export(tmp_path, checkpoint)
    whole = TinyModel(checkpoint)
    assert verify_bundle(bundle.folder).findings == ()
    with torch.no_grad():
        expected = whole.model(torch.tensor([TOKENS]), output_hidden_states=True)
    partition = Partition(bundle, num_threads=1)
    upper = UpperLayers(bundle, num_threads=1)
    cascade = Cascade(partition, len(TOKENS))
    lease = upper.new_pool(1 << 24).lease(len(TOKENS))
    for start, stop in ((0, 13), (13, 14), (14, 20)):
        cascade.append(TOKENS[start:stop])
        for block, layer in enumerate(EXITS):
            candidates = cascade.run(block)
            with torch.no_grad():
                state = whole.model.model.norm(expected.hidden_states[layer][0, stop - 1])
                logprobs = whole.model.lm_head(state).log_softmax(-1).numpy()
            np.testing.assert_allclose(
                candidates.logprobs, logprobs[candidates.token_ids], atol=1e-4
            )
        uploaded = cascade.hidden_states(len(EXITS) - 1, 0).astype(np.float16)
        logits = upper([Chunk(lease, uploaded[start:], start, stop, [stop - 1])])[0]
        torch.testing.assert_close(logits, whole.logits(uploaded, 2)[-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            logits, expected.logits[0, stop - 1], rtol=0, atol=0.02
        )  # uploads are float16
    for block, layer in enumerate(EXITS):
        assert (
            relative_error(
                cascade.hidden_states(block, 0), expected.hidden_states[layer][0].numpy()
            )
            < 1e-4
        )


def test_a_model_trained_with_early_exits_needs_no_heads(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "model", tie_word_embeddings=False)
    bundle = export(tmp_path, checkpoint, exits=(1, 3))
    assert bundle.manifest.exit_head == "shared"
    cascade = Cascade(Partition(bundle, num_threads=1), len(TOKENS))
    cascade.append(TOKENS)
    for block, layer in enumerate(bundle.manifest.exits):
        shortened = AutoModelForCausalLM.from_pretrained(checkpoint, num_hidden_layers=layer).eval()
        with torch.no_grad():
            logprobs = shortened(torch.tensor([TOKENS])).logits[0, -1].log_softmax(-1).numpy()
        candidates = cascade.run(block)
        np.testing.assert_allclose(candidates.logprobs, logprobs[candidates.token_ids], atol=1e-4)
        assert candidates.token_ids[0] == logprobs.argmax()


@pytest.mark.parametrize(
    ("name", "quantization"),
    [("qwen3-untied", "int8"), ("qwen3-untied", "int4"), *((name, "balanced") for name in MODELS)],
)
def test_other_models_export_quantised_too(
    name: str, quantization: Quantization, tmp_path: Path
) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "model", **{"num_hidden_layers": 3} | MODELS[name])
    assert verify_bundle(export(tmp_path, checkpoint, quantization).folder).findings == ()


@pytest.mark.parametrize(
    ("model_type", "overrides", "message"),
    [
        *(
            (
                model_type,
                {},
                f"model type '{model_type}' cannot be exported: "
                "expected one of llama, mistral, qwen2",
            )
            for model_type in (
                "gpt2",
                "gemma",
                "gemma3_text",
                "mixtral",
                "qwen2_moe",
                "qwen3_moe",
                "phi3",
            )
        ),
        ("mistral", {"sliding_window": 32}, "sliding-window attention"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            "sliding-window",
        ),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
            "sliding-window",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope scaling 'dynamic'",
        ),
        ("llama", LONG_ROPE, "rope scaling 'longrope'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial rotary"),
        (
            "llama",
            {"head_dim": 24},
            "attention heads of 24 dimensions cannot be exported: expected a multiple of 16",
        ),
        (
            "llama",
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            r"a quantised checkpoint \(gptq\)",
        ),
    ],
)
def test_models_that_cannot_be_exported_are_refused_in_one_line(
    model_type: str, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=message) as raised:
        check_model(AutoConfig.for_model(model_type, **overrides))
    assert "\n" not in str(raised.value)


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "model type 'mixtral' cannot be exported"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers is '4': expected a whole number"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6': expected a number"),
        ({"max_position_embeddings": None}, "max_position_embeddings is None: expected a whole"),
        ({"model_type": "mine"}, "cannot load model .* has model type `mine`"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}, "contains custom code"),
        (
            {"quantization_config": {"quant_method": "awq"}},
            r"a quantised checkpoint \(awq\) cannot be exported",
        ),
        ({"num_hidden_layers": 1}, "exits 2: expected layers from 1 to 1 for this model"),
        (
            {"num_hidden_layers": 5},
            r"lacks 9 of its weights, such as model\.layers\.4\.input_layernorm\.weight",
        ),
        ({"tie_word_embeddings": False}, r"lacks 1 of its weights, such as lm_head\.weight"),
        ({"intermediate_size": 256}, "cannot load model .* size mismatch"),
    ],
)
def test_checkpoints_whose_config_does_not_fit_are_refused_in_one_line(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "model")
    set_config(checkpoint, **changes)
    assert_refused(tmp_path, checkpoint, message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "config.json",
            r"cannot load model .*no config\.json in it; expected a checkpoint's folder",
        ),
        ("model.safetensors", "cannot load model .*no file named"),
        ("tokenizer.json", "cannot load model .* with AutoTokenizer"),
    ],
)
def test_checkpoints_without_one_of_their_files_are_refused_in_one_line(
    name: str, message: str, tmp_path: Path
) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "model")
    (checkpoint / name).unlink()
    assert_refused(tmp_path, checkpoint, message)


def test_a_model_that_never_ends_is_refused_in_one_line(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "model")
    set_config(checkpoint, eos_token_id=None)
    (checkpoint / "generation_config.json").unlink()
    tokenizer = make_tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(checkpoint)
    assert_refused(tmp_path, checkpoint, "names no end-of-sequence token; set eos_token_id")


def test_a_checkpoint_that_was_cut_off_is_refused_in_one_line(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "model")
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    assert_refused(tmp_path, checkpoint, r"cannot load model .*expected \d+ bytes within the file")


def assert_refused(folder: Path, checkpoint: Path, message: str) -> None:
    with pytest.raises(ExportError, match=message) as raised:
        export(folder, checkpoint)
    assert "\n" not in str(raised.value)
    assert [path.name for path in folder.iterdir()] == ["model"]
