"""Agreement of an engine's best tokens with the model in float32, along its greedy answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.engines import EngineProcess
from fleet.utils.prompt_file import read_prompts
from onnx_export.checkpoint import WHEEL_SHA256, cache_folder
from onnx_export.fingerprints import tool_versions

PROMPTS: Final = Path(__file__).parent / "data" / "prompts.txt"
NEW_TOKENS: Final = 64


@dataclass(frozen=True)
class ReferenceAnswer:
    """A conversation's token ids and the model's own greedy answer to it."""

    prompt: list[int]
    answer: list[int]


def default_answers(
    load: Callable[[], tuple[Any, Any]], prompts: Path, progress: Callable[[str], None]
) -> list[ReferenceAnswer]:
    """Return the default model's own answers to a file of prompts, kept in the cache.

    `load` returns the model and its tokenizer.
    """
    texts = read_prompts(prompts)
    key = hashlib.sha256(
        json.dumps([WHEEL_SHA256, texts, NEW_TOKENS, tool_versions()]).encode()
    ).hexdigest()[:16]
    path = cache_folder() / "bench" / f"answers-{key}.json"
    if not path.exists():
        answers = greedy_answers(*load(), texts, progress)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps([asdict(answer) for answer in answers]))
        partial.replace(path)
    return [ReferenceAnswer(**answer) for answer in json.loads(path.read_text())]


def greedy_answers(
    model: Any, tokenizer: Any, texts: Sequence[str], progress: Callable[[str], None]
) -> list[ReferenceAnswer]:
    """Return greedy answers of `NEW_TOKENS` tokens at most by PyTorch in float32.

    An end-of-sequence token is part of an answer.
    """
    answers = []
    for i, text in enumerate(texts, 1):
        progress(f"the model's own answer in float32, {i} of {len(texts)}")
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        input_ids = torch.tensor([ids])
        with torch.inference_mode():
            whole = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
            )
        answers.append(ReferenceAnswer(list(ids), whole[0, len(ids) :].tolist()))
    return answers


def token_agreement(engine: EngineProcess, answers: Sequence[ReferenceAnswer]) -> float:
    """Return the share of the answers' tokens that the engine ranks best after those before."""
    equal = total = 0
    for answer in answers:
        best = engine.ask("best", prompt=answer.prompt, answer=answer.answer)["best"]
        equal += sum(a == b for a, b in zip(best, answer.answer, strict=True))
        total += len(answer.answer)
    return equal / total
