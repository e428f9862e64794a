"""A tiny random model with a real tokenizer: everything the real one has, in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from onnx_export.heads import HeadKind, HeadsFile, model_fingerprint, new_head, save_heads

VOCAB_SIZE = 384
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer of `VOCAB_SIZE` ids: three special tokens, 256 bytes, and fillers."""
    vocab = {
        token: i
        for i, token in enumerate((*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())))
    }
    for i in range(len(vocab), VOCAB_SIZE):
        vocab[f"w{i}"] = i
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


@torch.no_grad()
def round_to_grid(weight: Tensor) -> None:
    """Round weight [n, k] to 16 steps in each block of 32, as in llama.cpp's Q4_1 files."""
    blocks = weight.view(weight.shape[0], -1, 32)
    low = blocks.amin(-1, keepdim=True)
    high = blocks.amax(-1, keepdim=True)
    step = (high - low) / 15
    blocks.copy_(low + step * ((blocks - low) / step).round())


def make_tiny_checkpoint(
    folder: Path,
    seed: int = 0,
    model_type: str = "llama",
    end_scale: float = 0.0,
    **overrides: Any,
) -> Path:
    """Random model in `folder`: 4 layers, hidden 64, 4 query and 2 key-value heads, 384 ids.

    `end_scale`: deviation of the end token's row in the LM head. At 0 hardly any text ends.
    """
    sizes = {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    config = AutoConfig.for_model(model_type, **sizes | overrides)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear) and module.in_features % 32 == 0:
                round_to_grid(module.weight)
    with torch.no_grad():  # what starts at 1 or 0 would hide a mistake in a norm or a bias
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
        if end_scale:
            row = model.lm_head.weight[model.config.eos_token_id]
            row.copy_(torch.randn_like(row) * end_scale)
    model.save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


def make_tiny_heads(
    path: Path,
    checkpoint: Path,
    exits: tuple[int, ...] = (1, 2, 3),
    kind: HeadKind = "linear",
    seed: int = 1,
) -> Path:
    """Random exit heads for the model in `checkpoint`, near where training starts."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    torch.manual_seed(seed)
    heads = {}
    for layer in exits:
        heads[layer] = new_head(kind, model, layer)
        with torch.no_grad():
            for parameter in heads[layer].parameters():
                parameter.add_(
                    torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.02)
                )
    save_heads(HeadsFile(heads, kind, model_fingerprint(model)), path)
    return path
