"""Lets a model answer prompts in large batches and keeps what its layers see of each position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "grouped_static"
TENSORS = ("token_ids", "lengths", "prompt_lengths", "final", "top_ids", "top_logprobs")
TOP_K = 32  # of the full model's distribution, kept for each position
PREFILL_POSITIONS = 4096  # in one pass, over all rows


@dataclass(kw_only=True)
class Answers:
    """Conversations one after the other, n positions in all, m of which predict a token of an answer.

    `token_ids` int32 [n]; `lengths` and `prompt_lengths` int32 [conversations]: positions of each, and of its prompt;
    `hidden`: by layer count, float16 [n, hidden]; for the m answering positions `final` float16 [m, hidden] after the
    last norm, `top_ids` int32 [m, 32] and `top_logprobs` float16 [m, 32] of the full model, best first. A
    conversation's last position predicts its last token, which is not among the positions.
    """

    token_ids: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    hidden: dict[int, Tensor]
    final: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    def __len__(self) -> int:
        """The number of conversations."""
        return len(self.lengths)

    @cached_property
    def starts(self) -> Tensor:
        """The first position of each conversation, int64 [conversations]."""
        return self.lengths.cumsum(0) - self.lengths

    @cached_property
    def answer_starts(self) -> Tensor:
        """The first of each conversation's answering positions among all m of them, int64 [conversations]."""
        counts = self.lengths - self.prompt_lengths + 1
        return counts.cumsum(0) - counts

    def answering(self, conversation: int) -> tuple[slice, slice]:
        """One conversation's answering positions: among the n and among the m."""
        stop = int(self.starts[conversation] + self.lengths[conversation])
        start = int(self.starts[conversation] + self.prompt_lengths[conversation]) - 1
        first = int(self.answer_starts[conversation])
        return slice(start, stop), slice(first, first + stop - start)


def concatenate(parts: Sequence[Answers]) -> Answers:
    """All conversations of `parts`, which have the same layers."""
    whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in TENSORS}
    return Answers(
        hidden={layer: torch.cat([p.hidden[layer] for p in parts]) for layer in parts[0].hidden},
        **whole,
    )


class Generation:
    """A batch of conversations under way, with one static cache; rows that end leave it when they are many.

    `prompts`: token ids of each row's prompt. Rows are padded on the left.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self.model = model
        self.device = model.device
        width = max(map(len, prompts))
        padded = [[0] * (width - len(ids)) + list(ids) for ids in prompts]
        self.input_ids = torch.tensor(padded, device=self.device)
        self.starts = torch.tensor([width - len(ids) for ids in prompts], device=self.device)
        self.rows = torch.arange(len(prompts), device=self.device)
        self.columns = torch.arange(width, device=self.device)
        self.cache = StaticCache(model.config, max_cache_len=width + max_new_tokens)

    def forward(self) -> Tensor:
        """Runs the columns that wait; the last column's final hidden states [rows, hidden]."""
        width = max(1, PREFILL_POSITIONS // len(self.rows))
        for columns, input_ids in zip(
            self.columns.split(width), self.input_ids.split(width, 1), strict=True
        ):
            output = self.model.model(
                input_ids,
                attention_mask=causal_mask(self.starts, columns, self.model.dtype),
                position_ids=(columns - self.starts[:, None]).clamp(min=0),
                cache_position=columns,
                past_key_values=self.cache,
            )
        last: Tensor = output.last_hidden_state[:, -1]
        return last

    def append(self, token_ids: Tensor, live: Tensor) -> Tensor:
        """Adds one token a row; rows that are not `live` go when they are a quarter of the batch. The new `live`."""
        if 4 * int(live.sum()) <= 3 * len(live):
            keep = live.nonzero().flatten()
            live = live[keep]
            for layer in self.cache.layers:
                layer.keys = layer.keys[keep]
                layer.values = layer.values[keep]
            self.rows = self.rows[keep]
            self.starts = self.starts[keep]
            token_ids = token_ids[keep]
        self.input_ids = token_ids[:, None]
        self.columns = self.columns[-1:] + 1
        return live


@torch.no_grad()
def complete(
    model: Any,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> list[list[int]]:
    """What the model says after each prompt, up to and without a token of `ends`; cut off at `max_new_tokens`."""
    batch = Generation(model, prompts, max_new_tokens)
    stop = torch.tensor(ends, device=batch.device)
    said: list[list[int]] = [[] for _ in prompts]
    live = torch.ones(len(prompts), dtype=torch.bool, device=batch.device)
    with own_attention(model):
        for _ in range(max_new_tokens):
            token_ids = choose(model.lm_head(batch.forward()), temperature, generator)
            live = live & ~torch.isin(token_ids, stop)
            for row, token_id in zip(
                batch.rows[live].tolist(), token_ids[live].tolist(), strict=True
            ):
                said[row].append(token_id)
            if not live.any():
                break
            live = batch.append(token_ids, live)
    return said


@torch.no_grad()
def answer(
    model: Any,
    prompts: Sequence[Sequence[int]],
    layers: Sequence[int],
    ends: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> Answers:
    """Answers every prompt, which ends with a token of `ends` or after `max_new_tokens`."""
    batch = Generation(model, prompts, max_new_tokens)
    width = batch.input_ids.shape[1]
    count = len(prompts)
    columns = width + max_new_tokens
    hidden_size = model.config.hidden_size
    stop = torch.tensor(ends, device=batch.device)
    hidden = {
        layer: torch.empty(count, columns, hidden_size, dtype=torch.float16) for layer in layers
    }
    tokens = torch.zeros(count, columns, dtype=torch.int32)
    tokens[:, :width] = batch.input_ids.cpu()
    first = batch.starts.cpu()
    last = torch.full((count,), width)
    finals = torch.empty(count, max_new_tokens, hidden_size, dtype=torch.float16)
    top_ids = torch.empty(count, max_new_tokens, TOP_K, dtype=torch.int32)
    top_logprobs = torch.empty(count, max_new_tokens, TOP_K, dtype=torch.float16)
    live = torch.ones(count, dtype=torch.bool, device=batch.device)

    with own_attention(model), watch(model, layers) as seen:
        for step in range(max_new_tokens):
            seen.clear()
            final = batch.forward()
            rows = batch.rows.cpu()
            start = int(batch.columns[0])
            end = int(batch.columns[-1]) + 1
            for layer in layers:
                hidden[layer][rows, start:end] = torch.cat(seen[layer], 1).to("cpu", torch.float16)
            logits = model.lm_head(final).float()
            top = logits.topk(TOP_K, -1)
            finals[rows, step] = final.to("cpu", torch.float16)
            top_ids[rows, step] = top.indices.to("cpu", torch.int32)
            top_logprobs[rows, step] = (top.values - logits.logsumexp(-1, keepdim=True)).to(
                "cpu", torch.float16
            )
            token_ids = choose(logits, temperature, generator, top.indices[:, 0])
            last[rows[live.cpu()]] = width + step
            live = live & ~torch.isin(token_ids, stop)
            if not live.any() or step == max_new_tokens - 1:
                break
            tokens[rows, width + step] = token_ids.to("cpu", torch.int32)
            live = batch.append(token_ids, live)
    column = torch.arange(columns)
    real = (column >= first[:, None]) & (column < last[:, None])
    answering = torch.arange(max_new_tokens) < (last - width + 1)[:, None]
    # position p of a row predicts the token at p + 1: the prompt's last column is the first that answers
    return Answers(
        token_ids=tokens[real],
        lengths=(last - first).int(),
        prompt_lengths=(width - first).int(),
        hidden={layer: states[real] for layer, states in hidden.items()},
        final=finals[answering],
        top_ids=top_ids[answering],
        top_logprobs=top_logprobs[answering],
    )


@contextmanager
def watch(model: Any, layers: Sequence[int]) -> Iterator[dict[int, list[Tensor]]]:
    """While it lasts, collects each pass's hidden states [rows, columns, hidden] after `layers` layers."""
    seen: dict[int, list[Tensor]] = {}

    def hook(layer: int) -> Any:
        def note(_module: Any, _inputs: Any, output: Any) -> None:
            seen.setdefault(layer, []).append(output[0] if isinstance(output, tuple) else output)

        return note

    handles = [model.model.layers[layer - 1].register_forward_hook(hook(layer)) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def causal_mask(starts: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores, [batch, 1, s, columns so far]: -inf for padding and the future."""
    past = torch.arange(int(columns[-1]) + 1, device=columns.device)
    hidden = (past > columns[:, None]) | (
        past < torch.minimum(starts[:, None], columns)[:, :, None]
    )
    return torch.zeros(hidden.shape, dtype=dtype, device=columns.device).masked_fill_(
        hidden, float("-inf")
    )[:, None]


def grouped_attention(
    _module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [b, heads, s, d], key and value [b, kv_heads, >= n, d], unrepeated -> [b, s, heads, d]."""
    batch, heads, length, dim = query.shape
    num_columns = mask.shape[-1]
    key = key[:, :, :num_columns]
    value = value[:, :, :num_columns]
    grouped = query.reshape(batch, key.shape[1], -1, dim)
    scores = (
        (grouped @ key.transpose(2, 3))
        .mul_(scaling)
        .view(batch, heads, length, num_columns)
        .add_(mask)
    )
    weights = scores.softmax(-1).view(batch, key.shape[1], -1, num_columns)
    return (weights @ value).view(batch, heads, length, dim).transpose(1, 2), None


@contextmanager
def own_attention(model: Any) -> Iterator[None]:
    """While it lasts, `model` runs `grouped_attention`: repeating keys for each query head costs most of the time."""
    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[ATTENTION] = grouped_attention
    model.config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        model.config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[ATTENTION]


def choose(
    logits: Tensor, temperature: float, generator: torch.Generator, best: Tensor | None = None
) -> Tensor:
    """Next token ids [batch] from logits [batch, vocab]; temperature 0 is greedy, where `best` saves a search."""
    if temperature == 0:
        return logits.argmax(-1) if best is None else best
    cumulative = (
        (logits.float() / temperature).softmax(-1).cumsum(-1)
    )  # far faster on a CPU than torch.multinomial
    drawn = torch.rand(len(logits), 1, generator=generator).to(logits.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, drawn, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
