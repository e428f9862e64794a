"""Training makes exit heads that agree with the full model more often than untrained ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fleet.errors import ConfigError
from onnx_export.corpus import Answer, States, answer, collect, concatenate, own_attention, read_prompts, replay
from onnx_export.fitting import evaluate, fine_tune, fit_ridge
from onnx_export.heads import load_heads, shared_heads

EXITS = (1, 3)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Any:
    """The tiny model, ready to run."""
    language_model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    return language_model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def states(model: Any) -> States:
    """Answers of the tiny model to 64 random prompts of several lengths."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 384, (4 + i % 5,), generator=generator).tolist() for i in range(64)]
    batches = [prompts[:32], prompts[32:]]
    return collect(model, batches, EXITS, 10**9, 24, generator, lambda _: None)


def test_a_batch_of_padded_prompts_gives_what_each_gives_alone(model: Any) -> None:
    prompts, generator = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]], torch.Generator()
    with own_attention(model):
        together = concatenate(list(answer(model, prompts, EXITS, 6, 0.0, generator)))
        for i, prompt in enumerate(prompts):
            alone = concatenate(list(answer(model, [prompt], EXITS, 6, 0.0, generator)))
            rows = together.conversation == i
            for layer in EXITS:
                torch.testing.assert_close(together.exits[layer][rows], alone.exits[layer], rtol=1e-2, atol=1e-2)


def test_an_earlier_answer_gives_the_states_that_it_was_made_with(model: Any) -> None:
    prompt = [5, 6, 7, 8, 9]
    with own_attention(model):
        first = concatenate(list(answer(model, [prompt], EXITS, 6, 0.0, torch.Generator())))
        token_ids = model.lm_head(first.final.float()).argmax(-1).tolist()
        again = replay(model, Answer(prompt, token_ids), EXITS, 0)
    torch.testing.assert_close(again.final, first.final, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(again.exits[1], first.exits[1], rtol=1e-2, atol=1e-2)


def test_whole_conversations_are_held_out(states: States) -> None:
    training, held_out = states.split()
    assert len(training) + len(held_out) == len(states)
    assert not set(training.conversation.tolist()) & set(held_out.conversation.tolist())


def test_the_closed_form_and_the_tuning_each_come_nearer_to_the_full_model(model: Any, states: States) -> None:
    heads = shared_heads(EXITS, model.model.norm.weight, model.config.rms_norm_eps)
    lm_head = model.lm_head.weight.detach()
    losses = [divergence(heads[3], lm_head, states)]
    for layer, head in heads.items():
        fit_ridge(head, states.exits[layer], states.final)
    losses.append(divergence(heads[3], lm_head, states))
    fine_tune(heads, lm_head, states, 8, torch.Generator().manual_seed(0), lambda _: None)
    losses.append(divergence(heads[3], lm_head, states))
    assert losses[0] > losses[1] > losses[2]
    scores, offload = evaluate(heads, lm_head, states, 0.0)
    assert offload == 0.0
    assert all(share == 1.0 for _, share, _ in scores.values())


def divergence(head: Any, lm_head: torch.Tensor, states: States) -> float:
    """Mean Kullback-Leibler divergence of exit 3 from the full model."""
    with torch.no_grad():
        target = (states.final.float() @ lm_head.T).log_softmax(-1)
        own = (head(states.exits[3].float()) @ lm_head.T).log_softmax(-1)
        return float((target.exp() * (target - own)).sum(-1).mean())


def test_prompts_come_in_both_forms_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "one"}, {"instruction": "two", "input": "three"}, {"instruction": "four"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_prompts([path]) == ["one", "two\nthree", "four"]
    path.write_text('{"prompt": "one"}\n{"text": "two"}\n')
    with pytest.raises(ConfigError, match=r"prompts\.jsonl:2: expected a JSON object with 'prompt'"):
        read_prompts([path])


def test_the_command_writes_heads_for_each_exit(tmp_path: Path, tiny_checkpoint: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "heads.safetensors"
    prompts.write_text("".join(json.dumps({"prompt": f"word {i}"}) + "\n" for i in range(12)))
    command = [sys.executable, "-m", "onnx_export.train", "--model", str(tiny_checkpoint), "--exits", "1,2"]
    command += ["--prompts", str(prompts), "--out", str(out), "--tokens", "100", "--max-new-tokens", "12"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr
    assert set(load_heads(out, (1, 2), 64, 1e-6)) == {1, 2}
    assert "held-out" in result.stdout
