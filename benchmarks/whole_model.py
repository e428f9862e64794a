"""The deployed full model in one process: all edge blocks, then the cloud's layers, without exits.

    python -m benchmarks.whole_model --prompts FILE.jsonl --max-new-tokens 64 [--limit 8]
        [--compare DEMO.json]

This is the oracle of `fleet demo --mode verified --json`, and of `--threshold 1.0`: the same
bundle, the same FP16 hidden states between the halves, but the cloud's half is plain Hugging Face
code with its own cache. With --compare it follows the token ids of a demo's JSON, lists every one
that is not its own choice with the two logits, and exits with status 1 unless these lie within
`TIE` of each other everywhere: batches of other sizes round differently.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import numpy as np
import torch
import typer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from edge_agent.engine.tokenizer import ChatTokenizer
from fleet.bundles.manifest import Bundle
from fleet.constraints.token_constraint import TokenConstraint
from fleet.graphs.cascade import Cascade
from fleet.graphs.partition import Partition
from fleet.protocol.choice_rules import Float32, Int64, adjust_logits
from fleet.protocol.messages import NO_RULES, ChoiceRules, Sampling
from fleet.protocol.prompt import ChatMessage, PromptRequest
from fleet.protocol.sampling import draw
from fleet.server.supervisor import resolve_bundle
from fleet.utils.path_options import path_option
from fleet.utils.prompt_file import read_prompts

TIE: Final = 1e-3


class TokenDifference(NamedTuple):
    """A difference from the whole model's choice.

    Token number `number` of an answer is `got`, whose logit is `gap` below that of `expected`.
    """

    number: int
    expected: int
    got: int
    gap: float


class WholeModel:
    """Both halves of a bundle, run one after the other for every position."""

    def __init__(self, bundle: Bundle, num_threads: int = 2) -> None:
        self.partition = Partition(bundle, num_threads)
        self.tokenizer = ChatTokenizer(bundle)
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(bundle.folder / "cloud"), dtype=torch.float32
        )
        missing, unexpected = model.load_state_dict(
            load_file(bundle.path("cloud/model.safetensors")), strict=False
        )
        if unexpected or set(missing) - {"model.embed_tokens.weight"}:
            raise ValueError(
                f"the cloud partition does not fit its config: "
                f"{missing} missing, {unexpected} unexpected"
            )
        self._upper = model.eval()

    def prompt_ids(self, prompt: str | Sequence[ChatMessage]) -> list[int]:
        """Return the tokens that a device makes of a text or of a conversation."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(PromptRequest(prompt=prompt))
        return self.tokenizer.encode_chat(prompt)

    def logits(
        self, cascade: Cascade, cache: DynamicCache, token_ids: Sequence[int]
    ) -> torch.Tensor:
        """Append `token_ids` and run everything; return the last logits [vocab] float32."""
        manifest = self.partition.manifest
        block = manifest.exits.index(manifest.upload_layer)
        start = cascade.num_filled(block)
        cascade.append(token_ids)
        for i in range(len(manifest.exits)):
            cascade.run(i)
        hidden_states = cascade.hidden_states(block, start).astype(np.float16).astype(np.float32)
        hidden_states *= getattr(self._upper.config, "state_scale", 1.0)
        inputs = torch.from_numpy(hidden_states)[None]
        with torch.inference_mode():
            # By position: the cache's name changed in transformers 5.24.
            output = self._upper(None, None, None, cache, inputs, logits_to_keep=1)
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def generate(
        self,
        prompt: str | Sequence[ChatMessage],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        rules: ChoiceRules = NO_RULES,
    ) -> list[int]:
        """Return token ids, greedy unless `sampling` is given.

        The last one may be an end-of-sequence token.
        """
        return [token_id for token_id, _ in self.steps(prompt, max_new_tokens, sampling, rules)]

    def differences(
        self,
        prompt: str | Sequence[ChatMessage],
        token_ids: Sequence[int],
        rules: ChoiceRules = NO_RULES,
    ) -> list[TokenDifference]:
        """Return the differences of a greedy answer from the whole model's choices.

        Each token is judged after the answer's own earlier tokens.
        """
        prompt_ids = self.prompt_ids(prompt)
        cascade = Cascade(self.partition, len(prompt_ids) + len(token_ids))
        cache = DynamicCache()
        result = []
        for number, got in enumerate(token_ids):
            logits = self.logits(cascade, cache, [token_ids[number - 1]] if number else prompt_ids)
            text = [*prompt_ids, *token_ids[:number]]
            scores = adjust_logits(np.arange(len(logits)), logits.numpy(), rules, text)
            expected = int(scores.argmax())
            if expected != got:
                gap = float(scores[expected] - scores[got])
                result.append(TokenDifference(number, expected, got, gap))
        return result

    def steps(
        self,
        prompt: str | Sequence[ChatMessage],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        rules: ChoiceRules = NO_RULES,
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield each token with the logits [vocab] float32 that it was chosen from."""
        prompt_ids = self.prompt_ids(prompt)
        constraint = None
        if rules.constraint:
            grammars = self.tokenizer.grammars
            constraint = grammars.constrain(rules.constraint, len(prompt_ids))
        cascade = Cascade(self.partition, len(prompt_ids) + max_new_tokens)
        cache = DynamicCache()
        token_ids: list[int] = []
        for _ in range(max_new_tokens):
            logits = self.logits(cascade, cache, token_ids[-1:] or prompt_ids)
            scores, ids = self._candidates(logits, rules, [*prompt_ids, *token_ids], constraint)
            position = cascade.num_tokens - 1
            chosen = draw(scores, ids, position, sampling or Sampling(), rules.min_p)
            token_ids.append(int(ids[chosen]))
            yield token_ids[-1], logits
            if token_ids[-1] in self.partition.manifest.model.eos_token_ids:
                return

    def _candidates(
        self,
        logits: torch.Tensor,
        rules: ChoiceRules,
        text: Sequence[int],
        constraint: TokenConstraint | None,
    ) -> tuple[Float32, Int64]:
        """Return the best tokens after the rules, which change the whole vocabulary: the scores
        [k], and the tokens [k].

        A token whose score is below all unchanged ones of the best is no candidate.
        """
        top_k = self.partition.manifest.top_k
        every = np.arange(len(logits))
        adjusted = torch.from_numpy(adjust_logits(every, logits.numpy(), rules, text))
        allowed = constraint.allowed(text) if constraint else None
        if allowed is not None:
            adjusted[torch.from_numpy(~allowed)] = -torch.inf
            top_k = min(top_k, int(allowed.sum()))
        scores, ids = adjusted.topk(top_k)
        is_few = allowed is not None and allowed.sum() <= self.partition.manifest.top_k
        lowest = -torch.inf if is_few else logits.topk(top_k).values[-1]
        num_kept = int((scores >= lowest).sum())
        return scores[: num_kept or None].numpy(), ids[: num_kept or None].numpy()


def run(
    prompts: Annotated[Path, path_option(help="JSONL file of prompts, as for 'fleet demo'.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    limit: Annotated[int | None, typer.Option(help="Only the first prompts.")] = None,
    bundle: Annotated[
        Path | None, path_option(help="Model bundle (default: the default model's).")
    ] = None,
    compare: Annotated[Path | None, path_option(help="Output of 'fleet demo --json'.")] = None,
) -> None:
    """Print the greedy token ids of the whole model, or compare them with a demo's."""
    model = WholeModel(
        Bundle.load(resolve_bundle(bundle, lambda line: print(line, file=sys.stderr)))
    )
    texts = read_prompts(prompts)[:limit]
    if compare is None:
        print(json.dumps({"token_ids": [model.generate(text, max_new_tokens) for text in texts]}))
        return
    answers = [result["token_ids"] for result in json.loads(compare.read_text())["results"][:limit]]
    num_differing = 0
    num_excused = 0
    for text, token_ids in zip(texts, answers, strict=True):
        for difference in model.differences(text, token_ids):
            print(f"{text[:40]!r}: {difference}")
            num_differing = num_differing + 1
            num_excused = num_excused + (difference.gap <= TIE)
    print(
        f"{len(answers)} answers, {sum(map(len, answers))} tokens: {num_differing} are "
        f"not the whole model's, {num_excused} of these where the two logits lie within {TIE:g}"
    )
    raise typer.Exit(0 if num_differing == num_excused else 1)


if __name__ == "__main__":
    typer.run(run)
