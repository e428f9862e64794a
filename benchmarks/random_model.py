"""Models of published shapes with random weights, which are made when they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast

from onnx_export.architecture import check_exits, check_model
from onnx_export.config import ExportConfig
from onnx_export.streamed_model import FINAL_NORM, LM_HEAD, StreamedModel, make_skeleton
from onnx_export.weights import RandomWeights

MAX_POSITIONS: Final = 512
SPECIAL_TOKENS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE: Final = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a model. `is_tied`: the embedding is the LM head, too."""

    model_type: str = "llama"
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    is_tied: bool = False

    @property
    def exits(self) -> tuple[int, ...]:
        """Exits at a quarter and at half of the layers."""
        return self.num_layers // 4, self.num_layers // 2

    def config(self) -> Any:
        """Return the configuration of transformers."""
        return AutoConfig.for_model(
            self.model_type,
            num_hidden_layers=self.num_layers,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            vocab_size=self.vocab_size,
            tie_word_embeddings=self.is_tied,
            max_position_embeddings=MAX_POSITIONS,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
            dtype="bfloat16",
        )


SHAPES: Final = {
    "0.5b": ModelShape(  # Qwen2.5-0.5B
        model_type="qwen2",
        num_layers=24,
        hidden_size=896,
        intermediate_size=4864,
        num_heads=14,
        num_kv_heads=2,
        vocab_size=151_936,
        is_tied=True,
    ),
    "1.1b": ModelShape(  # TinyLlama
        num_layers=22,
        hidden_size=2048,
        intermediate_size=5632,
        num_heads=32,
        num_kv_heads=4,
        vocab_size=32_000,
    ),
    "3b": ModelShape(  # Llama-3.2-3B
        num_layers=28,
        hidden_size=3072,
        intermediate_size=8192,
        num_heads=24,
        num_kv_heads=8,
        vocab_size=128_256,
        is_tied=True,
    ),
    "7b": ModelShape(  # Llama-2-7B
        num_layers=32,
        hidden_size=4096,
        intermediate_size=11_008,
        num_heads=32,
        num_kv_heads=32,
        vocab_size=32_000,
    ),
}


@dataclass(frozen=True)
class TiedRandomWeights(RandomWeights):
    """Random weights of a model whose LM head is the embedding.

    The final norm makes up for the embedding's scale, which is too large for an LM head.
    """

    def read(self, name: str) -> Tensor:
        weight = super().read(name)
        return weight * weight.numel() ** -0.5 if name == FINAL_NORM else weight


def random_model(
    shape: ModelShape, seed: int
) -> Callable[[ExportConfig, Callable[[str], None]], tuple[StreamedModel, Any]]:
    """Return a function that gives the export the model of a shape and its tokenizer."""

    def load(config: ExportConfig, _: Callable[[str], None]) -> tuple[StreamedModel, Any]:
        model_config = shape.config()
        check_model(model_config)
        check_exits(config.exits, shape.num_layers)
        weights = {
            name: tuple(weight.shape)
            for name, weight in make_skeleton(model_config).state_dict().items()
            if not (shape.is_tied and name == LM_HEAD)
        }
        kind = TiedRandomWeights if shape.is_tied else RandomWeights
        model = StreamedModel(config.model, model_config, kind(weights, seed))
        return model, byte_tokenizer(shape.vocab_size)

    return load


def byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each byte, and fillers up to `vocab_size` ids."""
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"w{number}" for number in range(len(tokens), vocab_size)]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    _, start, end = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=start, eos_token=end, chat_template=CHAT_TEMPLATE
    )
