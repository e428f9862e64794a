"""The model's upper layers: Hugging Face's own code, run over one ragged batch of many sessions.

Rows of all sessions pass through each linear layer together. Attention runs for each session alone,
on that session's cache. For this purpose the module registers its function `ragged_attention` in
transformers' ALL_ATTENTION_FUNCTIONS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cloud_broker_worker.worker.config import Weights
from cloud_broker_worker.worker.kv_pool import KvLease, KvPool, KvShape
from cloud_broker_worker.worker.packed_linear import pack_layers, weight_bytes
from fleet.bundles.decoder_variants import (
    Angles,
    angle_arguments,
    bounded,
    layer_output,
    restore_rotary_embeddings,
    rotate_positions,
)
from fleet.bundles.manifest import Bundle, Manifest
from fleet.bundles.tensor_file import TensorFile
from fleet.errors import BundleError, ConfigError
from fleet.protocol.hidden_states import Float16
from fleet.utils.memory_release import release_freed_memory

ATTENTION: Final = "cecollm_ragged"
DTYPES: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Chunk(NamedTuple):
    """Positions [start, stop) of one session. Positions [0, start) of this session have run.

    `hidden_states` [stop - start, hidden] float16 are the inputs of the lease's first layer. The
    worker computes logits for the positions `outputs`. A chunk is a tuple, so that `make_spans` can
    unpack it.
    """

    lease: KvLease
    hidden_states: Float16
    start: int
    stop: int
    outputs: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Span:
    """The rows of a batch that are positions [start, stop) of a cache."""

    lease: KvLease
    rows: slice
    start: int
    stop: int
    _masks: dict[int, Tensor] = field(default_factory=dict)

    def first_key(self, window: int | None) -> int:
        """Return the first position that a row sees. A row sees `window` positions, or all."""
        return 0 if window is None else max(0, self.start + 1 - window)

    def mask(self, window: int | None) -> Tensor:
        """Return a mask [stop - start, stop - first key]: True where a row sees a position.

        It is made once for all layers with this window.
        """
        size = min(window or self.stop, self.stop)
        if size not in self._masks:
            count = self.stop - self.start
            first = self.first_key(size)
            mask = torch.ones(count, self.stop - first, dtype=torch.bool)
            mask.tril_(self.start - first).triu_(self.start - first + 1 - size)
            self._masks[size] = mask
        return self._masks[size]

    def is_causal(self, window: int | None) -> bool:
        """Return whether the rows begin at position 0 and are all within the window.

        The kernel's option `is_causal` then replaces the mask.
        """
        return self.start == 0 and (window is None or self.stop <= window)


def ragged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    spans: Sequence[Span],
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Write each span's keys and values into its cache, and attend from its queries.

    query [1, heads, rows, d], key and value [1, kv_heads, rows, d] -> [1, rows, heads, d].
    A row sees `sliding_window` positions, its own included, or all. `softcap` bounds the scores.
    """
    del attention_mask, kwargs
    heads = query.shape[1]
    dim = query.shape[-1]
    num_rows = query.shape[2]
    kv_heads = key.shape[1]
    both = torch.stack((key[0], value[0]))
    scaled = query[0].transpose(0, 1) * scaling  # [rows, heads, d]
    out = torch.empty(num_rows, heads, dim)
    grouped, grouped_out = (rows.view(num_rows, kv_heads, -1, dim) for rows in (scaled, out))
    for span in spans:
        cache = span.lease.layers[module.layer_idx - span.lease.first_layer]
        cache[:, :, span.start : span.stop] = both[:, :, span.rows]
        keys, values = cache[:, :, span.first_key(sliding_window) : span.stop]
        if span.stop - span.start == 1:
            row = span.rows.start
            one_row_attention(grouped[row], keys, values, out=grouped_out[row], cap=softcap)
        elif softcap is not None:
            mask = span.mask(sliding_window)
            rows = capped_attention(grouped[span.rows], keys, values, mask=mask, cap=softcap)
            grouped_out[span.rows] = rows
        else:
            is_causal = span.is_causal(sliding_window)
            rows = scaled_dot_product_attention(
                query[:, :, span.rows],
                keys[None],
                values[None],
                attn_mask=None if is_causal else span.mask(sliding_window),
                is_causal=is_causal,
                scale=scaling,
                enable_gqa=True,
            )
            out[span.rows] = rows[0].transpose(0, 1)
    return out[None], None


def one_row_attention(
    query: Tensor, keys: Tensor, values: Tensor, out: Tensor, cap: float | None = None
) -> None:
    """Attend from a scaled query [kv_heads, group, d] to keys and values [kv_heads, n, d].

    Write the result to `out` [kv_heads, group, d]. Three small kernels replace
    `scaled_dot_product_attention`: for one row, the overhead of its call is longer than the
    computation.
    """
    weights = bounded(torch.bmm(query, keys.transpose(1, 2)), cap).softmax(-1)
    torch.bmm(weights, values, out=out)


def capped_attention(
    query: Tensor, keys: Tensor, values: Tensor, *, mask: Tensor, cap: float
) -> Tensor:
    """Attend from query [rows, kv_heads, group, d], scaled, to keys and values [kv_heads, n, d].

    `mask` is [rows, n], and `cap` bounds the scores before it; PyTorch's kernel has no such bound.
    """
    scores = bounded(torch.einsum("rkgd,knd->kgrn", query, keys), cap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("kgrn,knd->rkgd", weights, values)


def make_spans(chunks: Sequence[Chunk]) -> list[Span]:
    """Return the spans of the chunks, with rows in the order of the layers where chunks begin."""
    spans = {}
    first = 0
    for i in sorted(range(len(chunks)), key=lambda i: chunks[i].lease.first_layer):
        lease, _, start, stop, _ = chunks[i]
        count = stop - start
        rows = slice(first, first + count)
        spans[i] = Span(lease=lease, rows=rows, start=start, stop=stop)
        first += count
    return [spans[i] for i in range(len(chunks))]


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, ragged_attention)


class UpperLayers:
    """Layers [from_layer, num_layers), final norm and LM head of a bundle, with weights in float32
    or fewer bits.

    `upload_layers` are the layers where a session may begin.
    """

    def __init__(
        self,
        bundle: Bundle,
        num_threads: int,
        weights: Weights = "float32",
        from_layer: int = 0,
    ) -> None:
        """Load the cloud partition from `from_layer` on; 0 stands for its lowest layer.

        Raises:
            BundleError: the cloud partition does not load, or there is none.
            ConfigError: no device of the bundle uploads after `from_layer` layers.
        """
        torch.set_num_threads(num_threads)
        self.manifest = bundle.manifest
        self.upload_layers = checked_layers(bundle.manifest, from_layer)
        try:
            self._model = load_model(bundle, weights, self.upload_layers[0])
            self._layers = list(self._model.model.layers)
        except (OSError, ValueError, RuntimeError) as error:
            raise BundleError(
                f"the cloud partition of {bundle.folder} does not load: {error}; "
                "export the bundle again"
            ) from None

        config = self._model.config
        self._state_scale: float = getattr(config, "state_scale", 1.0)
        self._logit_cap: float | None = getattr(config, "final_logit_softcapping", None)

    @property
    def weight_bytes(self) -> int:
        """The number of bytes of weights that a step reads."""
        return weight_bytes(self._model)

    def new_pool(self, budget_bytes: int) -> KvPool:
        """Return a pool of caches of this model's shape."""
        model = self.manifest.model
        shape = KvShape(
            num_layers=model.num_layers - self.manifest.upload_layer,
            num_kv_heads=model.num_key_value_heads,
            head_dim=model.head_dim,
            hidden_size=model.hidden_size,
        )
        return KvPool(shape, budget_bytes)

    @torch.inference_mode()
    def __call__(self, chunks: Sequence[Chunk]) -> Tensor:
        """Run every chunk's positions and add them to its cache.

        Each layer runs the rows of all chunks that begin at it or below. Return logits [number of
        outputs, vocab] float32, chunk by chunk.
        """
        spans = make_spans(chunks)
        num_rows = sum(span.stop - span.start for span in spans)
        rows = np.empty((num_rows, self.manifest.model.hidden_size), np.float16)
        positions = torch.empty(1, num_rows, dtype=torch.long)
        for span, chunk in zip(spans, chunks, strict=True):
            rows[span.rows] = chunk.hidden_states
            positions[0, span.rows] = torch.arange(span.start, span.stop)
        inputs = torch.from_numpy(rows).float()[None]
        if self._state_scale != 1.0:
            inputs *= self._state_scale
        hidden = self._run_layers(inputs, positions, spans)
        for span in spans:
            span.lease.length = max(span.lease.length, span.stop)
        output_rows = [
            span.rows.start + i - chunk.start
            for span, chunk in zip(spans, chunks, strict=True)
            for i in chunk.outputs
        ]
        outputs = hidden[0, torch.tensor(output_rows, dtype=torch.long)]
        logits: Tensor = self._model.lm_head(self._model.model.norm(outputs))
        return bounded(logits, self._logit_cap)

    def _run_layers(self, inputs: Tensor, positions: Tensor, spans: Sequence[Span]) -> Tensor:
        """Return the last layer's outputs [1, rows, hidden] of `inputs`, the rows of all spans."""
        angles = rotate_positions(self._model.model, inputs, positions)
        firsts = sorted({span.lease.first_layer for span in spans})
        hidden = inputs[:, :0]
        for first, stop in zip(firsts, [*firsts[1:], len(self._layers)], strict=True):
            begun = [span for span in spans if span.lease.first_layer <= first]
            num_rows = max(span.rows.stop for span in begun)
            hidden = torch.cat((hidden, inputs[:, hidden.shape[1] : num_rows]), 1)
            begun_angles = {kind: first_rows(pair, num_rows) for kind, pair in angles.items()}
            ids = positions[:, :num_rows]
            for layer in self._layers[first:stop]:
                arguments = angle_arguments(layer, begun_angles)
                out = layer(hidden, position_ids=ids, spans=begun, **arguments)
                hidden = layer_output(out)
        return hidden


def first_rows(angles: Angles, num_rows: int) -> Angles:
    """Return the angles of the first rows."""
    cosines, sines = angles
    return cosines[:, :num_rows], sines[:, :num_rows]


def checked_layers(manifest: Manifest, from_layer: int) -> tuple[int, ...]:
    """Return the layers after which devices may upload to a worker with the layers from
    `from_layer` on.

    Raises:
        BundleError: the device holds the whole model.
        ConfigError: no device uploads after `from_layer` layers.
    """
    if manifest.is_device_only:
        raise BundleError(
            f"bundle {manifest.bundle_id} has no layers for a worker: its devices hold the whole "
            "model; run no worker for it, or export it with --uploads"
        )
    first = from_layer or manifest.upload_layer
    if first not in manifest.upload_layers:
        layers = ", ".join(map(str, manifest.upload_layers))
        raise ConfigError(f"--from-layer {first}: expected one of the upload layers {layers}")
    return tuple(layer for layer in manifest.upload_layers if layer >= first)


def load_model(bundle: Bundle, weights: Weights, from_layer: int) -> Any:
    """Load the cloud partition, one tensor at a time, with weights of the kind `weights`.

    Layers below `from_layer` of the whole model have no weights.

    Raises:
        OSError, ValueError, RuntimeError: the partition cannot be read, or is of another model.
    """
    config = AutoConfig.from_pretrained(bundle.folder / "cloud", attn_implementation=ATTENTION)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.model.embed_tokens = None  # only the device needs it
    restore_rotary_embeddings(model.model)
    with TensorFile(bundle.path("cloud/model.safetensors")) as file:
        check_tensors(model, file)
        for number in range(from_layer - bundle.manifest.upload_layer):
            model.model.layers[number] = torch.nn.Identity()
        pack_layers(model, weights, lambda name: read_tensor(file, name))
        left = file.entries.keys() & model.state_dict().keys()
        norms = {name: read_tensor(file, name).float() for name in left}
        model.load_state_dict(norms, strict=False, assign=True)
    release_freed_memory()
    return model.eval().requires_grad_(False)


def check_tensors(model: Any, file: TensorFile) -> None:
    """Raise ValueError unless the file has the model's tensors, and no others."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = expected.keys() - file.entries.keys()
    unexpected = file.entries.keys() - expected.keys()
    if missing or unexpected:
        raise ValueError(
            f"{len(missing)} weights are missing, and {len(unexpected)} are not of this model"
        )
    for name, shape in expected.items():
        if file.entries[name].shape != shape:
            raise ValueError(f"{name} is {file.entries[name].shape}, expected {shape}")


def read_tensor(file: TensorFile, name: str) -> Tensor:
    """Read a tensor in its stored type."""
    return torch.from_numpy(file.read(name)).view(DTYPES[file.entries[name].dtype])
