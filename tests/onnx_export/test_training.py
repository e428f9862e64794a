"""Training makes heads that agree with the full model more often, from stored answers."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from fleet.bundles.decoder_variants import bounded
from fleet.errors import ConfigError, ExportError
from onnx_export.heads import HeadKind, load_heads, new_head
from onnx_export.streamed_model import load_whole_model
from onnx_export.training import corpus, fitting, train
from onnx_export.training.config import TrainConfig
from onnx_export.training.corpus import CorpusConfig
from onnx_export.training.fitting import (
    FitConfig,
    HeadRunner,
    SampledVocabulary,
    distillation_loss,
    evaluate_head,
    fit_by_gradient,
    fit_ridge,
)
from onnx_export.training.generation import (
    TrainingAnswers,
    best_tokens,
    concatenate,
    generate_answers,
    generate_texts,
)
from onnx_export.training.memory import generation_bytes, loaded_bytes, plan_generation
from onnx_export.training.prompts import (
    ChatFormat,
    check_yield,
    draw_many,
    generate_prompts,
    is_prompt,
    without_repeats,
)
from onnx_export.training.train import train_heads
from onnx_export.variants import state_scale
from tests.onnx_export.test_models import MODELS
from tests.tiny import make_tiny_checkpoint, make_tiny_tokenizer

EXITS = (1, 3)
END = 2


def load_model(checkpoint: Path) -> Any:
    """Load a model, ready to run."""
    language_model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return language_model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Any:
    """The tiny model, ready to run."""
    return load_model(tiny_checkpoint)


def random_prompts(count: int) -> list[list[int]]:
    """Return prompts of several lengths, always the same."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 384, (4 + i % 5,), generator=generator).tolist() for i in range(count)]


@pytest.fixture(scope="module")
def brief_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny model that draws a prompt in every third try, not in one of eighty."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "brief", end_scale=0.3)


@pytest.fixture(scope="module")
def answers(model: Any) -> TrainingAnswers:
    """Answers of the tiny model to 64 prompts."""
    batches = [random_prompts(64)[i : i + 32] for i in (0, 32)]
    return concatenate(
        [
            generate_answers(
                model,
                batch,
                layers=EXITS,
                ends=[END],
                max_new_tokens=24,
                temperature=0.0,
                generator=torch.Generator(),
            )
            for batch in batches
        ]
    )


def test_a_stored_answer_equals_the_models_output_for_it_alone(
    model: Any, answers: TrainingAnswers
) -> None:
    for conversation in (0, 5, 40):
        start = int(answers.starts[conversation])
        length = int(answers.lengths[conversation])
        ids = answers.token_ids[start : start + length].long()
        assert (
            ids[: int(answers.prompt_lengths[conversation])].tolist()
            == random_prompts(64)[conversation]
        )
        output = model(ids[None], output_hidden_states=True)
        for layer in EXITS:
            states = answers.hidden[layer][start : start + length].float()
            torch.testing.assert_close(states, output.hidden_states[layer][0], rtol=1e-2, atol=1e-2)
        positions, rows = answers.answering(conversation)
        logprobs = output.logits[0, positions.start - start :].log_softmax(-1)
        best = logprobs.topk(answers.top_ids.shape[1])
        torch.testing.assert_close(
            answers.top_logprobs[rows].float(), best.values, rtol=1e-2, atol=1e-2
        )
        assert answers.top_ids[rows][:-1, 0].tolist() == ids[positions.start - start + 1 :].tolist()


@pytest.mark.parametrize("cap", [None, 30.0])
def test_the_best_tokens_of_a_model_in_16_bits_are_those_of_exact_logits(
    cap: float | None, tiny_checkpoint: Path
) -> None:
    model = load_whole_model(str(tiny_checkpoint), "tiny", torch.bfloat16)
    model.config.final_logit_softcapping = cap
    generator = torch.Generator().manual_seed(4)
    final = (torch.randn(2000, 64, generator=generator) * 4).bfloat16()
    coarse = bounded(model.lm_head(final).float(), cap)
    exact = bounded(final.float() @ model.lm_head.weight.float().T, cap)
    top = best_tokens(model, final, coarse)
    assert torch.equal(top.ids[:, 0], exact.argmax(-1))
    assert not torch.equal(top.ids[:, 0], coarse.argmax(-1))
    torch.testing.assert_close(top.logits, exact.gather(1, top.ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mistral-window", "gemma2", "gemma3"])
def test_answers_of_models_with_windows_and_bounds_are_those_of_transformers(
    name: str, tmp_path: Path
) -> None:
    model = load_model(make_tiny_checkpoint(tmp_path / "model", **MODELS[name]))
    answers = generate_answers(
        model,
        random_prompts(2),
        layers=[3],
        ends=[END],
        max_new_tokens=16,
        temperature=0.0,
        generator=torch.Generator(),
    )
    # A block after all layers but the last is the rest of the model.
    head = new_head("block", model, 3)
    exit_hidden = HeadRunner(model, answers).forward(head, 3, [0, 1])
    torch.testing.assert_close(exit_hidden, answers.final.float(), rtol=1e-2, atol=2e-2)
    agreement = evaluate_head(head, 3, model, answers, torch.arange(2))[1]
    assert agreement.float().mean() > 0.9
    model.set_attn_implementation("eager")
    start = int(answers.starts[1])
    output = model(answers.token_ids[None, start:].long(), output_hidden_states=True)
    states = answers.hidden[3][start:].float() * state_scale(model.config)
    torch.testing.assert_close(states, output.hidden_states[3][0], rtol=1e-2, atol=1e-2)
    positions, rows = answers.answering(1)
    best = output.logits[0, positions.start - start :].log_softmax(-1).topk(8).values
    logprobs = answers.top_logprobs[rows, :8].float()
    torch.testing.assert_close(logprobs, best, rtol=1e-2, atol=1e-2)


def test_an_answer_ends_with_the_end_token_or_at_the_limit(answers: TrainingAnswers) -> None:
    for conversation in range(len(answers)):
        _, rows = answers.answering(conversation)
        chosen = answers.top_ids[rows, 0].tolist()
        assert END not in chosen[:-1]
        assert len(chosen) == 24 or chosen[-1] == END


def test_a_batch_gives_the_same_texts_as_each_prompt_alone(model: Any) -> None:
    together = generate_texts(
        model,
        random_prompts(6),
        ends=[END],
        max_new_tokens=8,
        temperature=0.0,
        generator=torch.Generator(),
    )
    alone = [
        generate_texts(
            model,
            [prompt],
            ends=[END],
            max_new_tokens=8,
            temperature=0.0,
            generator=torch.Generator(),
        )[0]
        for prompt in random_prompts(6)
    ]
    assert together == alone


def test_prompts_are_drawn_after_the_template_and_filtered(
    model: Any, tiny_checkpoint: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    chat = ChatFormat.of(tokenizer)
    words = [40, 41, 42]
    text = tokenizer.decode(words)
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True
    )
    ids = whole if isinstance(whole, list) else whole["input_ids"]
    assert [*chat.before, *words, *chat.after] == list(ids)
    drawn = generate_prompts(model, tokenizer, chat, 64, torch.Generator().manual_seed(1))
    assert all(is_prompt(text) for text in drawn)
    assert len(drawn) < 64
    assert not is_prompt("again and again and again and again and again")
    assert not is_prompt("Too short.")
    assert without_repeats(["What is this?", "what is  THIS", "Another one"]) == [
        "What is this?",
        "Another one",
    ]


def test_prompts_of_a_model_without_a_template_are_beginnings_of_texts(model: Any) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = None
    texts = ChatFormat.of(tokenizer)
    assert texts == ChatFormat(before=(), after=(), start=(END,), end=END)
    drawn = generate_prompts(model, tokenizer, texts, 64, torch.Generator().manual_seed(1))
    assert drawn
    assert all(is_prompt(text) for text in drawn)
    start = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", start)]
    )
    assert ChatFormat.of(tokenizer) == ChatFormat((start,), (), start=(start,), end=END)
    tokenizer.eos_token = None
    with pytest.raises(ExportError, match="no chat template and no end token"):
        ChatFormat.of(tokenizer)


def test_drawn_prompts_are_different_and_come_again_with_their_seed(
    brief_checkpoint: Path,
) -> None:
    model = load_model(brief_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(brief_checkpoint)
    counts: list[int] = []
    drawn = draw_many(model, tokenizer, count=10, seed=5, batch=32, progress=counts.append)
    assert len(set(drawn)) == 10 == counts[-1]
    assert draw_many(model, tokenizer, count=10, seed=5, batch=32, progress=counts.append) == drawn
    assert draw_many(model, tokenizer, count=10, seed=6, batch=32, progress=counts.append) != drawn
    with pytest.raises(ExportError, match="is it a chat model"):
        check_yield(2000, 3)


def test_few_prompts_are_drawn_from_few_texts(
    brief_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def counted(*arguments: Any) -> list[str]:
        sizes.append(arguments[3])
        return generate_prompts(*arguments)

    monkeypatch.setattr("onnx_export.training.prompts.generate_prompts", counted)
    model = load_model(brief_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(brief_checkpoint)
    drawn = draw_many(model, tokenizer, 3, seed=5, batch=192, progress=lambda _: None)
    assert len(drawn) == 3
    assert set(sizes) == {6}


def test_a_softmax_over_candidates_stands_for_the_whole_vocabulary() -> None:
    torch.manual_seed(0)
    lm_head = torch.randn(5000, 16)
    hidden = torch.randn(40, 16) * 0.5
    teacher = (hidden @ lm_head.T + torch.randn(40, 5000)).log_softmax(-1)
    best = teacher.topk(8)
    exact = (hidden @ lm_head.T).log_softmax(-1)
    inside = exact.gather(1, best.indices)
    rest = torch.log1p(-inside.exp().sum(1))
    probs = best.values.exp()
    expected = (-(probs * inside).sum(1) - (1 - probs.sum(1)) * rest).mean()
    losses = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        vocabulary = SampledVocabulary(best.indices, 5000, 1500, generator)
        assert len(vocabulary.ids) < 2000
        losses.append(
            distillation_loss(
                hidden @ lm_head[vocabulary.ids].T,
                vocabulary,
                probs,
                hard_share=0.0,
            )
        )
    assert float(torch.stack(losses).mean()) == pytest.approx(float(expected), rel=0.02)


@pytest.mark.parametrize("kind", ["linear", "mlp", "block"])
def test_training_brings_each_kind_of_head_nearer_to_the_full_model(
    model: Any, answers: TrainingAnswers, kind: HeadKind
) -> None:
    everything = torch.arange(len(answers))
    head = new_head(kind, model, 1, 32)
    before = evaluate_head(head, 1, model, answers, everything)[1].float().mean()
    config = FitConfig(epochs=12, learning_rate=3e-3)
    fit_by_gradient(
        {1: head},
        model,
        answers=answers,
        conversations=everything,
        config=config,
        tick=lambda _: None,
    )
    after = evaluate_head(head, 1, model, answers, everything)[1].float().mean()
    assert after > before + 0.1


def test_a_head_is_judged_a_few_rows_at_a_time(
    model: Any, answers: TrainingAnswers, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = new_head("shared", model, 3)
    everything = torch.arange(len(answers))
    whole = evaluate_head(head, 3, model, answers, everything)
    monkeypatch.setattr(fitting, "ROWS", 5)
    confidence, agrees = evaluate_head(head, 3, model, answers, everything)
    torch.testing.assert_close(confidence, whole[0])
    assert torch.equal(agrees, whole[1])
    logits = model.lm_head(HeadRunner(model, answers).forward(head, 3, everything.tolist()))
    torch.testing.assert_close(confidence, logits.softmax(-1).max(-1).values)


def test_a_head_does_not_depend_on_the_others_in_training(
    model: Any, answers: TrainingAnswers
) -> None:
    everything = torch.arange(len(answers))
    config = FitConfig(epochs=2)
    together = {layer: new_head("linear", model, layer) for layer in EXITS}
    fit_by_gradient(
        together,
        model,
        answers=answers,
        conversations=everything,
        config=config,
        tick=lambda _: None,
    )
    for layer in EXITS:
        alone = new_head("linear", model, layer)
        fit_by_gradient(
            {layer: alone},
            model,
            answers=answers,
            conversations=everything,
            config=config,
            tick=lambda _: None,
        )
        assert torch.equal(alone.adapter.weight, together[layer].adapter.weight)
        assert not torch.equal(alone.adapter.weight, torch.eye(len(alone.adapter.weight)))


def test_the_closed_form_comes_nearer_to_the_final_states(
    model: Any, answers: TrainingAnswers
) -> None:
    rows, targets = (
        torch.cat([torch.arange(s.start, s.stop) for s in side])
        for side in zip(*[answers.answering(c) for c in range(len(answers))], strict=True)
    )
    head = new_head("linear", model, 3)

    def error() -> float:
        return float(
            (head(answers.hidden[3][rows].float()) - answers.final[targets].float()).pow(2).mean()
        )

    with torch.no_grad():
        before = error()
        fit_ridge(head, answers.hidden[3][rows], answers.final[targets])
        assert error() < before


def test_a_block_head_sees_the_whole_conversation_and_nothing_after(
    model: Any, answers: TrainingAnswers
) -> None:
    head = new_head("block", model, 3)
    runner = HeadRunner(model, answers)
    together = runner.forward(head, 3, [4, 9])
    alone = torch.cat([runner.forward(head, 3, [4]), runner.forward(head, 3, [9])])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def tiny_config(folder: Path, checkpoint: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "exits": (1, 2),
        "tokens": 900,
        "epochs": 1.0,
        "max_new_tokens": 12,
        "batch": 16,
        "processes": 2,
    }
    return TrainConfig(
        out=folder / "heads.safetensors",
        cache=folder / "cache",
        model=str(checkpoint),
        **values | changes,
    )


def test_interrupted_training_goes_on_and_gives_the_same_heads(
    tmp_path: Path, brief_checkpoint: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"one two three {i}\n" for i in range(16)))
    shards: dict[str, Any] = {"tokens": 500, "prompts": (prompts,)}  # two drawn, one of the file
    train_heads(tiny_config(tmp_path / "whole", brief_checkpoint, processes=1, **shards))
    cut = tiny_config(tmp_path / "cut", brief_checkpoint, **shards)
    code = (
        "from pathlib import Path\n"
        "from onnx_export.training.config import TrainConfig\n"
        "from onnx_export.training.train import train_heads\n"
        f"if __name__ == '__main__': train_heads({cut!r})\n"
    )
    script = tmp_path / "train.py"
    script.write_text(code.replace("PosixPath", "Path"))
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    process = subprocess.Popen(
        [sys.executable, str(script)], env=environment, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "cut").rglob("answers-*.safetensors")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
    made = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "cut").rglob("answers-*.safetensors")
    }
    assert made
    train_heads(tiny_config(tmp_path / "cut", brief_checkpoint, processes=1, **shards))
    assert all(path.stat().st_mtime_ns == before for path, before in made.items())
    one, other = (load_file(tmp_path / name / "heads.safetensors") for name in ("whole", "cut"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_other_exits_and_kinds_are_trained_on_the_same_answers(
    tmp_path: Path, brief_checkpoint: Path
) -> None:
    config = tiny_config(tmp_path, brief_checkpoint, tokens=150, exits=(1,), processes=1)
    train_heads(config)
    (first,) = tmp_path.rglob("answers-00000.safetensors")
    before = load_file(first)
    train_heads(tiny_config(tmp_path, brief_checkpoint, tokens=150, exits=(3,), processes=1))
    after = load_file(first)
    assert after.keys() - before.keys() == {"hidden.3"}
    assert all(torch.equal(after[key], before[key]) for key in before)
    made = first.stat().st_mtime_ns
    train_heads(
        tiny_config(tmp_path, brief_checkpoint, tokens=150, exits=(1, 3), processes=1, kind="block")
    )
    assert first.stat().st_mtime_ns == made


def test_few_tokens_take_few_answers(tmp_path: Path, brief_checkpoint: Path) -> None:
    config = tiny_config(tmp_path, brief_checkpoint, tokens=150, batch=192)
    assert tiny_config(tmp_path, brief_checkpoint, tokens=50_000, batch=192).shard_size == 192
    stages: list[tuple[str, int, int]] = []
    train_heads(config, lambda *stage: stages.append(stage))
    shards = [load_file(path) for path in tmp_path.rglob("answers-*.safetensors")]
    assert sum(len(shard["lengths"]) for shard in shards) <= 40
    assert sum(len(shard["final"]) for shard in shards) >= 150
    memory = next(stage for stage, _, total in stages if total == 0)
    expected = "processes that generate answers: 2; memory of each: up to 0.4 GB for 10 conv"
    assert memory.startswith(expected)
    (first_answers, *_) = (done for stage, done, _ in stages if stage == "answering" and done)
    assert stages.index((memory, 0, 0)) < stages.index(("answering", first_answers, 150))


def test_little_memory_gives_fewer_processes_then_fewer_rows(model: Any) -> None:
    config = CorpusConfig(
        source="tiny", layers=(1,), seed=0, max_prompt_tokens=64, max_new_tokens=64, batch=64
    )
    size = model.num_parameters()
    needed = partial(generation_bytes, model.config, size, config)
    own = loaded_bytes(size)

    def planned(memory: int | None) -> tuple[int, int]:
        plan = plan_generation(
            model.config, size, config, processes=4, memory=memory, own_bytes=own
        )
        assert memory is None or own + plan.processes * plan.num_bytes <= memory
        return plan.processes, plan.rows

    assert planned(None) == planned(own + 4 * needed(64)) == (4, 64)
    assert planned(own + 4 * needed(20)) == (4, 20)
    assert planned(own + 4 * needed(4)) == (3, 64)
    assert planned(own + needed(1)) == (1, 1)
    with pytest.raises(ConfigError, match=r"at least 0\.8 GB of memory.* give --memory 0\.8"):
        planned(own + needed(0))


def test_a_shard_is_whole_however_few_rows_are_generated_at_once(
    tmp_path: Path, brief_checkpoint: Path
) -> None:
    plan = partial(plan_generation, processes=1, memory=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "plan_generation", lambda *args, **_: replace(plan(*args), rows=3))
        train_heads(tiny_config(tmp_path, brief_checkpoint, tokens=150, processes=1))
    (drawn, *_) = tmp_path.rglob("drawn-*.json")
    (shard, *_) = sorted(tmp_path.rglob("answers-*.safetensors"))
    assert len(json.loads(drawn.read_bytes())) > 3
    assert len(load_file(shard)["lengths"]) == 10


def test_a_process_that_is_ended_is_reported_in_one_line(
    tmp_path: Path, brief_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: fork)
    monkeypatch.setattr(corpus, "start_maker", lambda *_: os._exit(9))
    config = tiny_config(tmp_path, brief_checkpoint, tokens=150)
    with pytest.raises(ExportError, match=r"was ended, for lack of memory .*--memory or --batch"):
        train_heads(config)


def test_answers_to_drawn_prompts_serve_runs_with_other_files(
    tmp_path: Path, brief_checkpoint: Path
) -> None:
    train_heads(tiny_config(tmp_path, brief_checkpoint, tokens=150, processes=1))
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("answers-*.safetensors")}
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"one two three {i}\n" for i in range(16)))
    config = tiny_config(tmp_path, brief_checkpoint, tokens=150, processes=1, prompts=(file,))
    train_heads(config)
    (drawn_folder,) = {path.parent for path in made}
    assert {path: path.stat().st_mtime_ns for path in drawn_folder.glob("answers-*")} == made


def test_heads_describe_how_they_were_made(tmp_path: Path, brief_checkpoint: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"one two three {i}\n" for i in range(20)))
    config = tiny_config(
        tmp_path, brief_checkpoint, prompts=(prompts,), kind="mlp", tokens=100, processes=1
    )
    records = train_heads(config)
    file = load_heads(config.out, (1, 2), load_model(brief_checkpoint))
    assert file.kind == "mlp"
    assert file.made_by["seed"] == "0"
    assert len(file.made_by["sha256 of prompts.txt"]) == 64
    assert records.exits == (1, 2)
    assert len(records) > 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"exits": (2, 1)}, ExportError, "expected increasing layer counts"),
        ({"exits": (2, 2)}, ExportError, "expected increasing layer counts"),
        ({"exits": (1, 4)}, ExportError, "expected layers from 1 to 3"),
        ({"tokens": 0}, ConfigError, "tokens 0: expected at least 1"),
        ({"kind": "tree"}, ConfigError, "unknown kind of exit head 'tree'"),
    ],
)
def test_values_that_make_no_sense_are_refused_before_any_work(
    tmp_path: Path,
    tiny_checkpoint: Path,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        train_heads(tiny_config(tmp_path, tiny_checkpoint, **changes))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_model_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match="cannot load model") as raised:
        train_heads(tiny_config(tmp_path, tmp_path / "empty"))
    assert "\n" not in str(raised.value)
