"""Models of the Llama layout, split between device and worker, equal PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Phi3ForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from cloud_broker_worker.worker.upper_layers import Chunk, UpperLayers
from fleet.bundles.manifest import Bundle
from fleet.bundles.verify import verify_bundle
from fleet.errors import ExportError
from fleet.graphs.cascade import Cascade
from fleet.graphs.partition import Partition
from onnx_export.architecture import check_model, check_positions
from onnx_export.bundle import export_bundle
from onnx_export.config import ExportConfig, Quantization
from onnx_export.parity import relative_error
from onnx_export.streamed_model import open_model
from onnx_export.variants import state_scale
from tests.cloud_broker_worker.worker.conftest import TinyModel
from tests.onnx_export.oracle import optimum_logits
from tests.onnx_export.traces import shared_traces
from tests.tiny import VOCAB_SIZE, make_tiny_checkpoint, make_tiny_tokenizer

SplitModel = Callable[[str], tuple[Path, Bundle]]

MAX_POSITIONS = 512
TOKENS: list[int] = np.random.default_rng(5).integers(0, VOCAB_SIZE, 20).tolist()
OTHER_TOKENS = TOKENS[:9] + TOKENS[:8:-1]
RUNS = (
    (TOKENS, ((0, 13), (13, 14), (14, 20))),
    (OTHER_TOKENS, ((9, 10), (10, 20))),
)
"""Token ids, and the positions that run at once; the second goes on from position 9 of the first.
"""
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
    "mistral-window": {"model_type": "mistral", "sliding_window": 8},
    "qwen2-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "gemma2": {
        "model_type": "gemma2",
        "sliding_window": 8,
        "num_hidden_layers": 4,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 1.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_local_base_freq": 100.0,
    },
    "phi3": {"model_type": "phi3", "sliding_window": 8, "tie_word_embeddings": False},
    "phi4-mini": {
        "model_type": "phi3",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 1024,
        "original_max_position_embeddings": 512,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0 + i / 4 for i in range(8)],
            "long_factor": [2.0] * 8,
        },
    },
    "olmo2": {"model_type": "olmo2", "tie_word_embeddings": False},
}
ALTERNATING = ("smollm3", "qwen2-window", "gemma2", "gemma3")
"""Models with layers of two kinds. Two layers of these are exported, and one of the others."""
SECOND_OPINIONS = (
    "smollm",
    "mistral-window",
    "qwen2-window",
    "smollm3",
    "qwen3",
    "gemma3",
    "phi4-mini",
    "olmo2",
)
"""One model of each type that optimum exports right: it leaves out Gemma 2's bound of the scores.
"""
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "attention_factor": 1.5,
            "original_max_position_embeddings": 64,
        },
    },
    "yarn-inferred": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
}


@pytest.fixture(scope="module", autouse=True)
def _shared_traces() -> Iterator[None]:
    with shared_traces():
        yield


def export(
    folder: Path,
    checkpoint: Path,
    quantization: Quantization = "fp32",
    exits: tuple[int, ...] = (2,),
) -> Bundle:
    """Export a bundle whose exits share the final norm, with all tokens as candidates."""
    config = ExportConfig(
        out=folder / "bundle",
        exits=exits,
        model=str(checkpoint),
        exit_head="shared",
        quantization=quantization,
        top_k=VOCAB_SIZE,
        max_positions=MAX_POSITIONS,
        accept=1.0 if quantization == "fp32" else 0.8,  # random models choose between near ties
    )
    export_bundle(config)
    return Bundle.load(config.out)


@pytest.fixture(scope="module")
def split_model(tmp_path_factory: pytest.TempPathFactory) -> SplitModel:
    """Make each model once: its checkpoint, and its bundle in float32 with one exit."""

    @cache
    def make(name: str) -> tuple[Path, Bundle]:
        folder = tmp_path_factory.mktemp("split")
        model = {"num_hidden_layers": 3} | (MODELS | ROPES)[name]
        checkpoint = make_tiny_checkpoint(folder / "model", **model)
        return checkpoint, export(folder, checkpoint, exits=(exit_layer(name),))

    return make


def exit_layer(name: str) -> int:
    """Return the layer after which a model is split."""
    return 2 if name in ALTERNATING else 1


@pytest.mark.parametrize("name", MODELS | ROPES)
def test_device_and_worker_together_are_the_whole_model(name: str, split_model: SplitModel) -> None:
    checkpoint, bundle = split_model(name)
    layer = exit_layer(name)
    whole = TinyModel(checkpoint)
    whole.model.set_attn_implementation("eager")  # the other ones leave Gemma 2's bound out
    assert verify_bundle(bundle.folder).findings == ()
    upper = UpperLayers(bundle, num_threads=1)
    cascade = Cascade(Partition(bundle, num_threads=1), len(TOKENS))
    lease = upper.new_pool(1 << 24).lease(len(TOKENS))
    scale = np.float16(state_scale(whole.model.config))
    for token_ids, chunks in RUNS:
        with torch.no_grad():
            expected = whole.model(torch.tensor([token_ids]), output_hidden_states=True)
            exit_hidden = whole.model.model.norm(expected.hidden_states[layer][0])
            exit_logits = whole_logits(whole, exit_hidden)
            exit_logprobs = exit_logits.log_softmax(-1).numpy()
        cascade.truncate(chunks[0][0])
        for start, stop in chunks:
            cascade.append(token_ids[start:stop])
            candidates = cascade.run(0)
            logprobs = exit_logprobs[stop - 1, candidates.token_ids]
            np.testing.assert_allclose(candidates.logprobs, logprobs, atol=1e-4)
            every = torch.from_numpy(cascade.logits_of(0, stop - 1, None))
            torch.testing.assert_close(every, exit_logits[stop - 1], rtol=1e-4, atol=1e-3)
            uploaded = cascade.hidden_states(0, 0).astype(np.float16)
            logits = upper([Chunk(lease, uploaded[start:], start, stop, [stop - 1])])[0]
            same_input = whole.logits(uploaded * scale, layer)[-1]
            torch.testing.assert_close(logits, same_input, rtol=1e-4, atol=1e-4)
            # uploads are float16
            torch.testing.assert_close(logits, expected.logits[0, stop - 1], rtol=0, atol=0.02)
        states = expected.hidden_states[layer][0].numpy()
        assert relative_error(cascade.hidden_states(0, 0) * scale, states) < 1e-4


@pytest.mark.parametrize("name", SECOND_OPINIONS)
def test_device_and_worker_together_have_the_logits_of_optimums_graph(
    name: str, split_model: SplitModel, tmp_path: Path
) -> None:
    checkpoint, bundle = split_model(name)
    cascade = Cascade(Partition(bundle, num_threads=1), len(TOKENS))
    cascade.append(TOKENS)
    cascade.run(0)
    uploaded = cascade.hidden_states(0, 0).astype(np.float16)
    upper = UpperLayers(bundle, num_threads=1)
    lease = upper.new_pool(1 << 24).lease(len(TOKENS))
    logits = upper([Chunk(lease, uploaded, 0, len(TOKENS), range(len(TOKENS)))])
    expected = optimum_logits(checkpoint, tmp_path, TOKENS)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.02)  # uploads are float16


def whole_logits(whole: TinyModel, exit_hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits that transformers computes of the last norm's output [n, hidden]."""
    with pytest.MonkeyPatch.context() as patch:
        output = BaseModelOutputWithPast(last_hidden_state=exit_hidden[None])
        patch.setattr(whole.model.model, "forward", lambda **_: output)
        token_ids = torch.zeros(1, len(exit_hidden), dtype=torch.long)
        logits: torch.Tensor = whole.model(token_ids).logits
    return logits[0]


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
    [
        ("qwen3-untied", "int8"),
        ("qwen3-untied", "int4"),
        *((name, "balanced") for name in MODELS if not name.endswith("-window")),
    ],
)
def test_other_models_export_quantised_too(
    name: str, quantization: Quantization, tmp_path: Path
) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "model", **{"num_hidden_layers": 3} | MODELS[name])
    bundle = export(tmp_path, checkpoint, quantization, (exit_layer(name),))
    assert verify_bundle(bundle.folder).findings == ()


@pytest.mark.parametrize(
    ("model_type", "overrides", "message"),
    [
        *(
            (
                model_type,
                {},
                f"model type '{model_type}' cannot be exported: "
                "expected one of gemma2, gemma3_text, llama, mistral, olmo2, phi3, qwen2",
            )
            for model_type in (
                "gpt2",
                "gemma",
                "gemma3",
                "mixtral",
                "olmo",
                "phi",
                "qwen2_moe",
                "qwen3_moe",
            )
        ),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0: expected a whole number of at"),
        (
            "gemma3_text",
            {"use_bidirectional_attention": True},
            "attention to later positions .* cannot be exported",
        ),
        (
            "gemma2",
            {"final_logit_softcapping": "30"},
            "final_logit_softcapping is '30': expected a finite number",
        ),
        ("llama", {"rope_scaling": {"rope_type": "mine", "factor": 2.0}}, "rope scaling 'mine'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial rotary"),
        (
            "phi3",
            {"hidden_size": 64, "num_attention_heads": 2, "partial_rotary_factor": 0.75},
            r"partial rotary embedding \(0.75\) .* of 32 dimensions that is a multiple of 16",
        ),
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


@pytest.mark.parametrize(("original", "is_refused"), [(512, False), (511, True)])
def test_long_rope_is_refused_for_sessions_of_which_its_angles_depend(
    original: int, is_refused: bool
) -> None:
    rope = MODELS["phi4-mini"] | {"original_max_position_embeddings": original}
    sizes = {"hidden_size": 64, "pad_token_id": 0}
    config = AutoConfig.for_model(**sizes | rope)
    message = f"sessions of 512 tokens cannot be exported: .* give --max-positions {original}"
    with pytest.raises(ExportError, match=message) if is_refused else nullcontext():
        check_positions(config, MAX_POSITIONS)


def test_code_in_a_checkpoint_of_a_known_type_is_not_run(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "model", model_type="phi3")
    code = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    set_config(checkpoint, auto_map=code)
    (checkpoint / "mine.py").write_text("raise SystemExit('ran')")
    model = open_model(str(checkpoint), "mine")
    assert type(model.skeleton) is Phi3ForCausalLM


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "model type 'mixtral' cannot be exported"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers is '4': expected a whole number"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6': expected a finite number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan: expected a finite number above 0"),
        ({"rope_theta": 0.0}, r"rope_theta is 0\.0: expected a finite number above 0"),
        ({"num_hidden_layers": 4_000_000_000}, "is 4,000,000,000: expected at most 1,000"),
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
        ("tokenizer.json", r"cannot load model .*: it has no tokenizer\.json; save the model's"),
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
