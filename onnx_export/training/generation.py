"""Generation of answers in large batches, with the hidden states of each position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fleet.bundles.decoder_variants import bounded, layer_output
from onnx_export.variants import attention_mask, logit_cap, state_scale

ATTENTION = "grouped_static"
TENSORS = ("token_ids", "lengths", "prompt_lengths", "final", "top_ids", "top_logprobs")
TOP_K = 32  # tokens of the full model's distribution that are stored for each position
PREFILL_POSITIONS = 4096  # in one pass, over all rows


@dataclass(kw_only=True)
class TrainingAnswers:
    """Conversations one after the other: n positions, m of which predict a token of an answer.

    `token_ids` int32 [n]; `lengths` and `prompt_lengths` int32 [conversations]: positions of each
    conversation, and of its prompt; `hidden`: by layer count, float16 [n, hidden], divided by
    :func:`onnx_export.variants.state_scale`. For the m answering positions: `final` float16
    [m, hidden] after the last norm, `top_ids` int32 [m, 32] and `top_logprobs` float16
    [m, 32] of the full model, best first. A conversation's last position predicts its last token,
    which is not among the positions.
    """

    token_ids: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    hidden: dict[int, Tensor]
    final: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    def __len__(self) -> int:
        """Return the number of conversations."""
        return len(self.lengths)

    @cached_property
    def starts(self) -> Tensor:
        """The first position of each conversation, int64 [conversations]."""
        return self.lengths.cumsum(0) - self.lengths

    @cached_property
    def answer_starts(self) -> Tensor:
        """The index of each conversation's first answer among all m, int64 [conversations]."""
        counts = self.lengths - self.prompt_lengths + 1
        return counts.cumsum(0) - counts

    def answering(self, conversation: int) -> tuple[slice, slice]:
        """Return one conversation's answering positions: among the n and among the m."""
        begin = self.starts[conversation]
        stop = int(begin + self.lengths[conversation])
        start = int(begin + self.prompt_lengths[conversation]) - 1
        first = int(self.answer_starts[conversation])
        return slice(start, stop), slice(first, first + stop - start)


def concatenate(batches: Sequence[TrainingAnswers]) -> TrainingAnswers:
    """Return all conversations of `batches`, which have the same layers."""
    tensors = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in TENSORS}
    hidden = {
        layer: torch.cat([batch.hidden[layer] for batch in batches]) for layer in batches[0].hidden
    }
    return TrainingAnswers(hidden=hidden, **tensors)


class LayerCaches:
    """The keys and values of each layer of a batch, with room for `num_columns` columns."""

    def __init__(self, num_columns: int) -> None:
        self.num_columns = num_columns
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, stop: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the columns before `stop`; return those of all columns so far.

        key and value [rows, kv_heads, s, d] -> [rows, kv_heads, stop, d].
        """
        if layer not in self._layers:
            shape = (*key.shape[:2], self.num_columns, key.shape[-1])
            self._layers[layer] = (key.new_zeros(shape), key.new_zeros(shape))
        for cache, columns in zip(self._layers[layer], (key, value), strict=True):
            cache[:, :, stop - key.shape[2] : stop] = columns
        keys, values = self._layers[layer]
        return keys[:, :, :stop], values[:, :, :stop]

    def keep(self, rows: Tensor) -> None:
        """Remove all rows except `rows`."""
        for layer, (keys, values) in self._layers.items():
            self._layers[layer] = (keys[rows], values[rows])


class GenerationBatch:
    """A batch of conversations during generation, with its caches.

    Rows that end are removed when they are many. `prompts`: token ids of each row's prompt. Rows
    are padded on the left.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self.model = model
        self.device = model.device
        width = max(map(len, prompts))
        paddings = [width - len(ids) for ids in prompts]
        padded = [[0] * padding + list(ids) for padding, ids in zip(paddings, prompts, strict=True)]
        self.input_ids = torch.tensor(padded, device=self.device)
        self.starts = torch.tensor(paddings, device=self.device)
        self.rows = torch.arange(len(prompts), device=self.device)
        self.columns = torch.arange(width, device=self.device)
        self.live = torch.ones(len(prompts), dtype=torch.bool, device=self.device)
        self.scale = state_scale(model.config)
        self.caches = LayerCaches(width + max_new_tokens)

    def forward(self) -> Tensor:
        """Run the pending columns; return the last column's final hidden states [rows, hidden]."""
        width = max(1, PREFILL_POSITIONS // len(self.rows))
        column_chunks = self.columns.split(width)
        id_chunks = self.input_ids.split(width, 1)
        for columns, input_ids in zip(column_chunks, id_chunks, strict=True):
            output = self.model.model(
                input_ids,
                attention_mask=causal_mask(self.starts, columns, self.model.dtype),
                position_ids=(columns - self.starts[:, None]).clamp(min=0),
                use_cache=False,
                caches=self.caches,
            )
        last: Tensor = output.last_hidden_state[:, -1]
        return last

    def append(self, token_ids: Tensor) -> None:
        """Add one token a row; remove ended rows when they are a quarter of the batch."""
        if 4 * int(self.live.sum()) <= 3 * len(self.live):
            rows_to_keep = self.live.nonzero().flatten()
            self._keep(rows_to_keep)
            token_ids = token_ids[rows_to_keep]
        self.input_ids = token_ids[:, None]
        self.columns = self.columns[-1:] + 1

    def _keep(self, rows_to_keep: Tensor) -> None:
        """Remove all rows except `rows_to_keep`."""
        self.caches.keep(rows_to_keep)
        self.live = self.live[rows_to_keep]
        self.rows = self.rows[rows_to_keep]
        self.starts = self.starts[rows_to_keep]


@torch.no_grad()
def generate_texts(
    model: Any,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> list[list[int]]:
    """Return the model's continuation of each prompt.

    It stops before a token of `ends` or after `max_new_tokens`.
    """
    batch = GenerationBatch(model, prompts, max_new_tokens)
    stop = torch.tensor(ends, device=batch.device)
    texts: list[list[int]] = [[] for _ in prompts]
    with unrepeated_attention(model):
        for _ in range(max_new_tokens):
            logits = bounded(model.lm_head(batch.forward()), logit_cap(model.config))
            token_ids = sample_tokens(logits, temperature, generator)
            batch.live = batch.live & ~torch.isin(token_ids, stop)
            rows = batch.rows[batch.live].tolist()
            live_ids = token_ids[batch.live].tolist()
            for row, token_id in zip(rows, live_ids, strict=True):
                texts[row].append(token_id)
            if not batch.live.any():
                break
            batch.append(token_ids)
    return texts


@torch.no_grad()
def generate_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    layers: Sequence[int],
    ends: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> TrainingAnswers:
    """Answer every prompt; an answer ends with a token of `ends` or after `max_new_tokens`."""
    batch = GenerationBatch(model, prompts, max_new_tokens)
    buffers = AnswerBuffers(batch, layers, max_new_tokens)
    stop = torch.tensor(ends, device=batch.device)
    with unrepeated_attention(model), capture_hidden_states(model, layers) as captured:
        for step in range(max_new_tokens):
            captured.clear()
            final = batch.forward()
            buffers.add_hidden(batch, captured)
            logits = bounded(model.lm_head(final).float(), logit_cap(model.config))
            top = best_tokens(model, final, logits)
            buffers.add_step(batch, step, final, top, logits.logsumexp(-1, keepdim=True))
            token_ids = sample_tokens(logits, temperature, generator, top.ids[:, 0])
            batch.live = batch.live & ~torch.isin(token_ids, stop)
            if not batch.live.any() or step == max_new_tokens - 1:
                break
            buffers.add_tokens(batch, step, token_ids)
            batch.append(token_ids)
    return buffers.result()


class BestTokens(NamedTuple):
    """The best tokens of rows, best first: `ids` [rows, k], and their `logits` [rows, k]."""

    ids: Tensor
    logits: Tensor


def best_tokens(model: Any, final: Tensor, logits: Tensor) -> BestTokens:
    """Return the `TOP_K` best tokens of logits [rows, vocab], which `final` [rows, hidden] gave.

    Logits of 16 bits have many ties, so those of twice as many tokens are computed in float32.
    """
    if model.dtype == torch.float32:
        top = logits.topk(TOP_K, -1)
        return BestTokens(top.indices, top.values)
    ids = logits.topk(min(2 * TOP_K, logits.shape[-1]), -1).indices
    exact = (model.lm_head.weight[ids].float() @ final.float()[:, :, None])[:, :, 0]
    top = bounded(exact, logit_cap(model.config)).topk(TOP_K, -1)
    return BestTokens(ids.gather(1, top.indices), top.values)


class AnswerBuffers:
    """The stored tensors of a batch's answers, by row and column or step, on the CPU."""

    def __init__(self, batch: GenerationBatch, layers: Sequence[int], max_new_tokens: int) -> None:
        count, width = batch.input_ids.shape
        hidden_size = batch.model.config.hidden_size
        num_columns = width + max_new_tokens
        states = (count, num_columns, hidden_size)
        steps = (count, max_new_tokens)
        self.width = width
        self.tokens = torch.zeros(count, num_columns, dtype=torch.int32)
        self.tokens[:, :width] = batch.input_ids.cpu()
        self.first = batch.starts.cpu()
        self.last = torch.full((count,), width)
        self.hidden = {layer: torch.empty(states, dtype=torch.float16) for layer in layers}
        self.finals = torch.empty(*steps, hidden_size, dtype=torch.float16)
        self.top_ids = torch.empty(*steps, TOP_K, dtype=torch.int32)
        self.top_logprobs = torch.empty(*steps, TOP_K, dtype=torch.float16)

    def add_hidden(self, batch: GenerationBatch, captured: Mapping[int, list[Tensor]]) -> None:
        """Store the hidden states of the columns that ran."""
        rows = batch.rows.cpu()
        start = int(batch.columns[0])
        end = int(batch.columns[-1]) + 1
        for layer, chunks in captured.items():
            states = torch.cat(chunks, 1) / batch.scale
            self.hidden[layer][rows, start:end] = states.to("cpu", torch.float16)

    def add_step(
        self, batch: GenerationBatch, step: int, final: Tensor, top: BestTokens, log_sum: Tensor
    ) -> None:
        """Store a step's final states and best tokens, before its tokens are chosen."""
        rows = batch.rows.cpu()
        logprobs = top.logits - log_sum
        self.finals[rows, step] = final.to("cpu", torch.float16)
        self.top_ids[rows, step] = top.ids.to("cpu", torch.int32)
        self.top_logprobs[rows, step] = logprobs.to("cpu", torch.float16)
        self.last[rows[batch.live.cpu()]] = self.width + step

    def add_tokens(self, batch: GenerationBatch, step: int, token_ids: Tensor) -> None:
        """Store a step's tokens."""
        rows = batch.rows.cpu()
        self.tokens[rows, self.width + step] = token_ids.to("cpu", torch.int32)

    def result(self) -> TrainingAnswers:
        """Return the answers without padding.

        Position p of a row predicts the token at p + 1: the prompt's last column is the first that
        answers.
        """
        column = torch.arange(self.tokens.shape[1])
        is_real = (column >= self.first[:, None]) & (column < self.last[:, None])
        num_steps = self.last - self.width + 1
        answers = torch.arange(self.finals.shape[1]) < num_steps[:, None]
        return TrainingAnswers(
            token_ids=self.tokens[is_real],
            lengths=(self.last - self.first).int(),
            prompt_lengths=(self.width - self.first).int(),
            hidden={layer: states[is_real] for layer, states in self.hidden.items()},
            final=self.finals[answers],
            top_ids=self.top_ids[answers],
            top_logprobs=self.top_logprobs[answers],
        )


@contextmanager
def capture_hidden_states(model: Any, layers: Sequence[int]) -> Iterator[dict[int, list[Tensor]]]:
    """Collect each pass's hidden states [rows, columns, hidden] after `layers` layers."""
    captured: dict[int, list[Tensor]] = {}

    def hook(layer: int) -> Any:
        def capture(_module: Any, _inputs: Any, output: Any) -> None:
            captured.setdefault(layer, []).append(layer_output(output))

        return capture

    handles = [model.model.layers[layer - 1].register_forward_hook(hook(layer)) for layer in layers]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def causal_mask(starts: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask [batch, 1, s, columns so far] to add: -inf for padding and the future."""
    past = torch.arange(int(columns[-1]) + 1, device=columns.device)
    is_future = past > columns[:, None]
    begin = torch.minimum(starts[:, None], columns)
    is_padding = past < begin[:, :, None]
    hidden = is_future | is_padding
    mask = torch.zeros(hidden.shape, dtype=dtype, device=columns.device)
    return mask.masked_fill_(hidden, float("-inf"))[:, None]


def grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scaling: float,
    caches: LayerCaches | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend without a copy of key and value for each query head.

    query [b, heads, s, d], key and value [b, kv_heads, s, d] -> [b, s, heads, d]. `caches` has the
    keys and values of earlier columns, if there are any.
    """
    batch, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    num_columns = mask.shape[-1]
    if caches is not None:
        key, value = caches.append(module.layer_idx, num_columns, key, value)
    grouped = query.reshape(batch, kv_heads, -1, dim)
    if sliding_window is not None and num_columns > sliding_window:
        mask = mask + attention_mask(num_columns, sliding_window)[:, :, -length:].to(mask)
    scores = bounded((grouped @ key.transpose(2, 3)).mul_(scaling), softcap)
    masked = scores.view(batch, heads, length, num_columns).add_(mask)
    weights = masked.softmax(-1).view(batch, kv_heads, -1, num_columns)
    out = (weights @ value).view(batch, heads, length, dim)
    return out.transpose(1, 2), None


@contextmanager
def unrepeated_attention(module: Any) -> Iterator[None]:
    """Let a model or an attention run `grouped_attention`.

    Repeated keys would cost most of the time, and PyTorch's own kernel has no bound of the scores.
    """
    before = module.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[ATTENTION] = grouped_attention
    module.config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        module.config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[ATTENTION]


def sample_tokens(
    logits: Tensor, temperature: float, generator: torch.Generator, best: Tensor | None = None
) -> Tensor:
    """Return token ids [batch] for logits [batch, vocab]; `best` saves a search if greedy (0)."""
    if temperature == 0:
        return logits.argmax(-1) if best is None else best
    # Much faster on a CPU than torch.multinomial.
    probabilities = (logits.float() / temperature).softmax(-1)
    cumulative = probabilities.cumsum(-1)
    random = torch.rand(len(logits), 1, generator=generator).to(logits.device)
    target = random * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return ids.clamp(max=logits.shape[-1] - 1)
