"""Checkpoints that transformers 5 has written, read by the version of these tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from fleet.errors import ExportError
from onnx_export.checkpoint import load_tokenizer
from onnx_export.rotary_settings import adopt_rotary_settings, portable_settings
from tests.tiny import make_tiny_tokenizer

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
LONGROPE = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
HEADS = {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 128}
Settings = dict[str, Any]


@pytest.mark.parametrize(
    ("model_type", "parameters", "expected"),
    [
        (
            "llama",
            {"rope_type": "default", "rope_theta": 5e5},
            {"rope_theta": 5e5, "rope_scaling": None},
        ),
        ("llama", YARN | {"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": YARN}),
        (
            "phi3",
            LONGROPE
            | {
                "rope_type": "longrope",
                "type": "longrope",
                "rope_theta": 2e4,
                "partial_rotary_factor": 0.5,
                "original_max_position_embeddings": 64,
            },
            {
                "rope_theta": 2e4,
                "partial_rotary_factor": 0.5,
                "original_max_position_embeddings": 64,
                "rope_scaling": LONGROPE | {"type": "longrope"},
            },
        ),
        (
            "gemma3_text",
            {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
            {
                "rope_theta": 2e6,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "rope_local_base_freq": 100.0,
            },
        ),
    ],
)
def test_settings_of_transformers_5_get_the_names_of_transformers_4(
    model_type: str, parameters: Settings, expected: Settings
) -> None:
    given = AutoConfig.for_model(model_type, **HEADS, pad_token_id=0, rope_parameters=parameters)
    config = adopt_rotary_settings(given)
    assert {name: getattr(config, name) for name in expected} == expected
    same = AutoConfig.for_model(model_type, **HEADS, pad_token_id=0, **expected)
    assert portable_settings(config) == portable_settings(same)


def test_scaled_angles_of_layers_with_a_window_are_refused_in_one_line() -> None:
    local = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    full = {"rope_type": "default", "rope_theta": 1e6}
    parameters = {"full_attention": full, "sliding_attention": local}
    config = AutoConfig.for_model("gemma3_text", rope_parameters=parameters)
    with pytest.raises(ExportError, match="'linear' of layers with a window cannot be exported"):
        adopt_rotary_settings(config)


def test_a_tokenizer_of_transformers_5_is_read(tmp_path: Path) -> None:
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    make_tiny_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "TokenizersBackend"}
    path.write_text(json.dumps(settings))
    tokenizer = load_tokenizer(str(tmp_path), "tiny")
    assert tokenizer("How?").input_ids == make_tiny_tokenizer()("How?").input_ids
