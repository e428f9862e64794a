"""Training data for exit heads: what a model's own answers look like at the exits and at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta, Struct
from torch import Tensor
from transformers import StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fleet.errors import ConfigError

BATCH_SIZE = 64
ATTENTION = "grouped_on_cpu"
TEMPERATURES = (0.0, 0.8)  # batches take turns, so that heads see the likeliest answers and others


@dataclass
class States:
    """Hidden states of n positions that each predict one token of an answer.

    `exits`: by exit layer, float16 [n, hidden]; `final`: after the last layer and norm, float16 [n, hidden];
    `conversation`: int64 [n], equal within one answer.
    """

    exits: dict[int, Tensor]
    final: Tensor
    conversation: Tensor

    def __len__(self) -> int:
        return self.final.shape[0]

    def select(self, rows: Tensor) -> States:
        """The positions that `rows`, indices or a mask, names."""
        exits = {layer: states[rows] for layer, states in self.exits.items()}
        return States(exits, self.final[rows], self.conversation[rows])

    def split(self, every: int = 10) -> tuple[States, States]:
        """Training and held-out positions: each `every`-th conversation is held out whole."""
        held_out = self.conversation % every == 0
        return self.select(~held_out), self.select(held_out)


def concatenate(parts: Sequence[States]) -> States:
    """All positions of `parts`, which have the same exits."""
    exits = {layer: torch.cat([part.exits[layer] for part in parts]) for layer in parts[0].exits}
    return States(exits, torch.cat([p.final for p in parts]), torch.cat([p.conversation for p in parts]))


def read_prompts(paths: Iterable[Path]) -> list[str]:
    """Prompts of JSON lines with `prompt`, or `instruction` and `input`.

    Raises:
        ConfigError: a file that cannot be read, or a line with neither.
    """
    prompts = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the prompts {path}: {error}") from None
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                prompt = row["prompt"] if "prompt" in row else f"{row['instruction']}\n{row.get('input', '')}"
                prompts.append(prompt.strip())
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ConfigError(f"{path}:{number}: expected a JSON object with 'prompt' or 'instruction'") from None
    return prompts


class Answer(Struct):
    """One answer that the model gave: token ids of the whole chat prompt and of the answer."""

    prompt: Annotated[list[int], Meta(min_length=1)]
    answer: Annotated[list[int], Meta(min_length=1)]


def read_answers(path: Path) -> list[Answer]:
    """Earlier answers, as JSON lines.

    Raises:
        ConfigError: the file cannot be read or has another form.
    """
    try:
        return msgspec.json.Decoder(Answer).decode_lines(path.read_bytes())
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{path}: expected JSON lines with token ids 'prompt' and 'answer': {error}") from None


def make_batches(
    tokenizer: Any, prompts: Sequence[str], max_prompt_tokens: int, generator: torch.Generator
) -> list[list[list[int]]]:
    """Token ids of chats that are not too long, in batches of similar length, batches in random order."""
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        for prompt in prompts
    ]
    order = torch.randperm(len(chats), generator=generator).tolist()
    short = sorted((chats[i] for i in order if len(chats[i]) <= max_prompt_tokens), key=len)
    batches = [short[i : i + BATCH_SIZE] for i in range(0, len(short), BATCH_SIZE)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def collect(
    model: Any,
    batches: Iterable[list[list[int]]],
    exits: tuple[int, ...],
    num_tokens: int,
    max_new_tokens: int,
    generator: torch.Generator,
    progress: Callable[[int], None],
    earlier: Iterable[Answer] = (),
) -> States:
    """Lets the model answer until there are `num_tokens` positions or no prompt is left; `progress` hears how many.

    Answers that it gave `earlier` are read first, which is much faster.

    Raises:
        ConfigError: there is no prompt at all.
    """
    parts: list[States] = []
    total = num_conversations = 0
    with own_attention(model):
        for given in earlier:
            if total >= num_tokens:
                break
            parts.append(replay(model, given, exits, num_conversations))
            total, num_conversations = total + len(parts[-1]), num_conversations + 1
            progress(total)
    for number, batch in enumerate(batches):
        if total >= num_tokens:
            break
        temperature = TEMPERATURES[number % len(TEMPERATURES)]
        with own_attention(model):
            for part in answer(model, batch, exits, max_new_tokens, temperature, generator):
                part.conversation += num_conversations
                parts.append(part)
                total += len(part)
                progress(total)
        num_conversations += len(batch)
    if not parts:
        raise ConfigError("no prompt is short enough to train on; give others")
    return concatenate(parts)


@torch.no_grad()
def replay(model: Any, given: Answer, exits: tuple[int, ...], conversation: int) -> States:
    """The positions of one earlier answer."""
    columns = torch.arange(len(given.prompt) + len(given.answer) - 1)
    output = model.model(
        torch.tensor([given.prompt + given.answer[:-1]]),
        attention_mask=causal_mask(torch.tensor([0]), columns),
        use_cache=False,
        output_hidden_states=True,
    )
    first = len(given.prompt) - 1
    states = {layer: output.hidden_states[layer][0, first:].half() for layer in exits}
    final = output.last_hidden_state[0, first:].half()
    return States(states, final, torch.full((len(final),), conversation))


@torch.no_grad()
def answer(
    model: Any,
    prompts: list[list[int]],
    exits: tuple[int, ...],
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> Iterator[States]:
    """One part for each new token of a batch; rows that have ended leave the batch when they are half of it."""
    length = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (length - len(ids)) + ids for ids in prompts])
    starts = torch.tensor([length - len(ids) for ids in prompts])
    ends = torch.tensor(model.generation_config.eos_token_id).reshape(-1)
    cache = StaticCache(model.config, max_cache_len=length + max_new_tokens)
    rows, live, columns = torch.arange(len(prompts)), torch.ones(len(prompts), dtype=torch.bool), torch.arange(length)
    for _ in range(max_new_tokens):
        output = model.model(
            input_ids,
            attention_mask=causal_mask(starts, columns),
            position_ids=(columns - starts[:, None]).clamp(min=0),
            cache_position=columns,
            past_key_values=cache,
            output_hidden_states=True,
        )
        final = output.last_hidden_state[:, -1]
        states = {layer: output.hidden_states[layer][live, -1].half() for layer in exits}
        yield States(states, final[live].half(), rows[live])
        token_ids = choose(model.lm_head(final), temperature, generator)
        live &= ~torch.isin(token_ids, ends)
        if not live.any():
            return
        if 2 * int(live.sum()) <= len(live):
            keep = live.nonzero().flatten()
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[keep], layer.values[keep]
            rows, token_ids, starts, live = rows[keep], token_ids[keep], starts[keep], live[keep]
        input_ids, columns = token_ids[:, None], columns[-1:] + 1


def causal_mask(starts: Tensor, columns: Tensor) -> Tensor:
    """What is added to attention scores, float32 [batch, 1, s, columns so far]: -inf for padding and the future."""
    past = torch.arange(int(columns[-1]) + 1)
    hidden = (past > columns[:, None]) | (past < torch.minimum(starts[:, None], columns)[:, :, None])
    return torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None]


def grouped_attention(
    _module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """query [b, heads, s, d], key and value [b, kv_heads, >= n, d], unrepeated -> [b, s, heads, d]."""
    batch, heads, length, dim = query.shape
    num_columns = mask.shape[-1]
    key, value = key[:, :, :num_columns], value[:, :, :num_columns]
    grouped = query.reshape(batch, key.shape[1], -1, dim)
    scores = (grouped @ key.transpose(2, 3)).mul_(scaling).view(batch, heads, length, num_columns).add_(mask)
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


def choose(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Next token ids [batch] from logits [batch, vocab]; temperature 0 is greedy."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
