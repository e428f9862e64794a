"""Sizes of a model that no file has, for manifests in tests."""

from __future__ import annotations

from fleet.bundles.manifest import ModelInfo

TINY_MODEL = ModelInfo(
    name="tiny",
    architecture="LlamaForCausalLM",
    num_layers=4,
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=384,
    max_positions=512,
    eos_token_ids=(2,),
)
