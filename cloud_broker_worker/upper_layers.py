"""The model's upper layers: Hugging Face's own code, run over one ragged batch of many sessions.

Rows of all sessions go through every linear layer together; attention, registered as a function of our own in
transformers' ALL_ATTENTION_FUNCTIONS, runs per session on that session's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cloud_broker_worker.kv_pool import KvLease, KvPool
from fleet.codec import Float16
from fleet.errors import BundleError
from fleet.manifest import Bundle

ATTENTION: Final = "cecollm_ragged"


class Chunk(NamedTuple):
    """The next positions of one session: hidden_states [n, hidden] float16, to be appended to its cache."""

    lease: KvLease
    hidden_states: Float16


@dataclass(frozen=True)
class Span:
    """Rows [first, first + count) of a batch are positions [start, start + count) of a cache."""

    lease: KvLease
    first: int
    start: int
    count: int


def ragged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    spans: Sequence[Span],
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, rows, d], key and value [1, kv_heads, rows, d] -> [1, rows, heads, d]."""
    del attention_mask
    out = torch.empty_like(query)
    layer = module.layer_idx
    for span in spans:
        rows, end = slice(span.first, span.first + span.count), span.start + span.count
        keys, values = span.lease.keys[layer], span.lease.values[layer]
        keys[:, span.start : end] = key[0, :, rows]
        values[:, span.start : end] = value[0, :, rows]
        mask = None
        if span.count > 1 and span.start:
            mask = torch.ones(span.count, end, dtype=torch.bool).tril_(span.start)
        out[:, :, rows] = scaled_dot_product_attention(
            query[:, :, rows],
            keys[None, :, :end],
            values[None, :, :end],
            attn_mask=mask,
            is_causal=span.count > 1 and not span.start,
            scale=kwargs.get("scaling"),
            enable_gqa=True,
        )
    return out.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, ragged_attention)


class UpperLayers:
    """Layers [upload_layer, num_layers), final norm and LM head of a bundle, in float32."""

    def __init__(self, bundle: Bundle, num_threads: int) -> None:
        """Raises BundleError when the cloud partition does not load."""
        torch.set_num_threads(num_threads)
        self.manifest = bundle.manifest
        try:
            self._model = _load(bundle)
        except (OSError, ValueError, RuntimeError) as error:
            raise BundleError(
                f"the cloud partition of {bundle.folder} does not load: {error}; export it again"
            ) from None

    def new_pool(self, budget_bytes: int) -> KvPool:
        """A pool of caches of this model's shape."""
        model = self.manifest.model
        num_layers = model.num_layers - self.manifest.upload_layer
        return KvPool(num_layers, model.num_key_value_heads, model.head_dim, budget_bytes)

    @torch.inference_mode()
    def __call__(self, chunks: Sequence[Chunk]) -> Tensor:
        """Runs every chunk's positions and adds them to its cache; logits [len(chunks), vocab] of each one's last."""
        spans, first = [], 0
        for lease, hidden_states in chunks:
            spans.append(Span(lease, first, lease.length, len(hidden_states)))
            first += len(hidden_states)
        rows = np.concatenate([chunk.hidden_states for chunk in chunks]).astype(np.float32)
        hidden = torch.from_numpy(rows)[None]
        positions = torch.cat([torch.arange(span.start, span.start + span.count) for span in spans])[None]
        decoder = self._model.model
        rotary = decoder.rotary_emb(hidden, positions)
        for layer in decoder.layers:
            out = layer(hidden, position_ids=positions, position_embeddings=rotary, spans=spans)
            hidden = out[0] if isinstance(out, tuple) else out
        for span in spans:
            span.lease.length += span.count
        last = torch.tensor([span.first + span.count - 1 for span in spans])
        logits: Tensor = self._model.lm_head(decoder.norm(hidden[0, last]))
        return logits


def _load(bundle: Bundle) -> Any:
    config = AutoConfig.from_pretrained(bundle.folder / "cloud", attn_implementation=ATTENTION)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    missing, unexpected = model.load_state_dict(
        load_file(bundle.path("cloud/model.safetensors")), strict=False, assign=True
    )
    if unexpected or set(missing) - {"model.embed_tokens.weight"}:
        raise ValueError(f"{len(missing)} weights are missing, {len(unexpected)} do not belong there")
    model.model.embed_tokens = None  # the device has it
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)  # its table is computed, not stored
    return model.float().eval().requires_grad_(False)
