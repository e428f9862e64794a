"""The deployed full model in one process: every edge block, then the cloud's layers, without exits or network.

    python -m benchmarks.whole_model --prompts FILE.jsonl --max-new-tokens 64 [--limit 8] [--compare DEMO.json]

This is the oracle of `fleet demo --threshold 1.0 --json`: the same bundle, the same FP16 hidden states between the
halves, but the cloud's half is plain Hugging Face code with its own cache. With --compare it says whether the token
ids of a demo's JSON are the same, and exits with status 1 when they are not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from edge_agent.cascade import Cascade
from edge_agent.partition import Partition
from edge_agent.tokenizer import ChatTokenizer
from fleet.cli.serve import resolve_bundle
from fleet.manifest import Bundle
from fleet.prompt import ChatMessage
from fleet.prompt_file import read_prompts


class WholeModel:
    """Both halves of a bundle, run one after the other for every position."""

    def __init__(self, bundle: Bundle, num_threads: int = 2) -> None:
        self.partition = Partition(bundle, num_threads)
        self.tokenizer = ChatTokenizer(bundle)
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(bundle.folder / "cloud"), dtype=torch.float32
        )
        missing, unexpected = model.load_state_dict(load_file(bundle.path("cloud/model.safetensors")), strict=False)
        if unexpected or set(missing) - {"model.embed_tokens.weight"}:
            raise ValueError(f"the cloud partition does not fit its config: {missing} missing, {unexpected} unexpected")
        self._upper = model.eval()

    def logits(self, cascade: Cascade, cache: DynamicCache, token_ids: Sequence[int]) -> torch.Tensor:
        """Appends `token_ids` and runs everything; the last position's logits [vocab] float32."""
        manifest = self.partition.manifest
        block = manifest.exits.index(manifest.upload_layer)
        start = cascade.num_filled(block)
        cascade.append(token_ids)
        for i in range(len(manifest.exits)):
            cascade.run(i)
        hidden_states = cascade.hidden_states(block, start).astype(np.float16).astype(np.float32)
        with torch.inference_mode():
            output = self._upper(
                inputs_embeds=torch.from_numpy(hidden_states)[None], past_key_values=cache, logits_to_keep=1
            )
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def generate(self, prompt: str, max_new_tokens: int) -> list[int]:
        """Greedy token ids; the last one may be an end-of-sequence token."""
        prompt_ids = self.tokenizer.encode_chat([ChatMessage("user", prompt)])
        cascade, cache = Cascade(self.partition, len(prompt_ids) + max_new_tokens), DynamicCache()
        token_ids: list[int] = []
        for _ in range(max_new_tokens):
            token_ids.append(int(self.logits(cascade, cache, token_ids[-1:] or prompt_ids).argmax()))
            if token_ids[-1] in self.partition.manifest.model.eos_token_ids:
                break
        return token_ids


def run(
    prompts: Annotated[Path, typer.Option(help="JSONL file of prompts, as for 'fleet demo'.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    limit: Annotated[int | None, typer.Option(help="Only the first prompts.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="Model bundle (default: the default model's).")] = None,
    compare: Annotated[Path | None, typer.Option(help="What 'fleet demo --json' printed.")] = None,
) -> None:
    """Print the greedy token ids of the whole model, or compare them with a demo's."""
    model = WholeModel(Bundle.load(resolve_bundle(bundle, lambda line: print(line, file=sys.stderr))))
    expected = [model.generate(text, max_new_tokens) for text in read_prompts(prompts)[:limit]]
    if compare is None:
        print(json.dumps({"token_ids": expected}))
        return
    got = [result["token_ids"] for result in json.loads(compare.read_text())["results"]]
    equal = sum(a == b for a, b in zip(expected, got, strict=True))
    print(f"{equal} of {len(expected)} answers, {sum(map(len, expected))} tokens: equal to the whole model's")
    raise typer.Exit(0 if equal == len(expected) else 1)


if __name__ == "__main__":
    typer.run(run)
