"""Scores of the tiny model: answers of the deployed modes, judged once, with derived values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from benchmarks.paper.accuracy import FULL, MODES, SYSTEMS, VERIFIED, exit_preference, fits, score
from benchmarks.paper.accuracy_summary import Difference, summary, verified_differences
from benchmarks.paper.full_model import FullModel
from benchmarks.paper.in_process import InProcessFleet
from benchmarks.paper.rows import RowFile, Scored
from benchmarks.paper.sizes import SIZES
from benchmarks.paper.systems import CLOUD_ONLY
from benchmarks.paper.tasks import TASKS, Sample
from benchmarks.whole_model import WholeModel
from edge_agent.engine.tokenizer import ChatTokenizer
from fleet.bundles.manifest import Bundle
from fleet.errors import ConfigError
from fleet.graphs.partition import ExitCandidates
from fleet.protocol.prompt import ChatMessage, PromptRequest
from tests.tiny import make_tiny_checkpoint

SIZE = msgspec.structs.replace(SIZES["small"], scored_samples=2, table_tokens=8)
PROMPTS = ("Why is the sky blue?", "Name three fruits.")


@pytest.fixture(scope="module")
def fleet(tiny_bundle: Bundle) -> Iterator[InProcessFleet]:
    with InProcessFleet(tiny_bundle, 1) as fleet:
        yield fleet


def samples(name: str, num: int) -> Sequence[Sample]:
    labels = (1, 0) if TASKS[name].choices else (None, None)
    return [
        Sample(id=i, prompt=f"{name}: {prompt}", references=("blue fruits",), label=label)
        for i, (prompt, label) in enumerate(zip(PROMPTS, labels, strict=True))
    ][:num]


@pytest.fixture(scope="module")
def path(
    tiny_bundle: Bundle, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("scores") / "scores.jsonl"
    score(
        SIZE,
        tiny_bundle,
        load=samples,
        scored=RowFile(path, Scored),
        run="run",
        progress=lambda _: None,
        model=str(tiny_checkpoint),
    )
    return path


@pytest.fixture
def rows(path: Path) -> dict[tuple[object, ...], Scored]:
    return {row.key: row for row in RowFile(path, Scored)}


def test_every_system_answers_every_sample(rows: dict[tuple[object, ...], Scored]) -> None:
    assert set(rows) == {
        (system, name, i) for system in SYSTEMS for name in TASKS for i in range(2)
    }


@pytest.mark.parametrize("name", TASKS)
def test_full_and_verified_are_the_whole_models_answers(
    tiny_bundle: Bundle, rows: dict[tuple[object, ...], Scored], name: str
) -> None:
    whole = WholeModel(tiny_bundle, num_threads=1)
    task = TASKS[name]
    for sample in samples(name, 2):
        full = rows[FULL, name, sample.id]
        verified = rows[VERIFIED, name, sample.id]
        num_tokens = 1 if task.choices else task.max_tokens or SIZE.table_tokens
        assert (
            full.token_ids == verified.token_ids == tuple(whole.generate(sample.prompt, num_tokens))
        )
        assert full.agreement == verified.agreement == 1.0
        assert full.tokens_from == {"cloud": len(full.token_ids)}


@pytest.mark.parametrize("system", [system for system in MODES if system != VERIFIED])
def test_a_first_token_that_is_derived_is_the_devices(
    fleet: InProcessFleet, rows: dict[tuple[object, ...], Scored], system: str
) -> None:
    for name in ("boolq", "imdb"):
        for sample in samples(name, 2):
            request = msgspec.structs.replace(MODES[system], prompt=sample.prompt, max_new_tokens=1)
            answer = fleet.ask(request)
            row = rows[system, name, sample.id]
            assert (answer.token_ids, answer.tokens_from, answer.text) == (
                row.token_ids,
                row.tokens_from,
                row.text,
            )


def test_a_deployed_answer_is_the_devices(
    fleet: InProcessFleet, rows: dict[tuple[object, ...], Scored]
) -> None:
    (sample, _) = samples("alpaca", 2)
    answer = fleet.ask(
        PromptRequest(prompt=sample.prompt, max_new_tokens=8, mode=MODES["standalone"].mode)
    )
    row = rows["standalone", "alpaca", 0]
    assert (answer.token_ids, answer.tokens_from) == (row.token_ids, row.tokens_from)
    assert answer.text == row.text


def test_nothing_is_scored_twice(
    tiny_bundle: Bundle, tiny_checkpoint: Path, path: Path, tmp_path: Path
) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    cut = tmp_path / "scores.jsonl"
    cut.write_bytes(b"".join(lines[:-3]))
    said: list[str] = []
    score(
        SIZE,
        tiny_bundle,
        load=samples,
        scored=RowFile(cut, Scored),
        run="run",
        progress=said.append,
        model=str(tiny_checkpoint),
    )
    assert [line for line in said if "sample" in line] == ["alpaca: sample 2 of 2"]
    assert len(cut.read_bytes().splitlines()) == len(lines)
    assert list(RowFile(cut, Scored)) == list(RowFile(path, Scored))


def test_another_checkpoint_is_refused(tiny_bundle: Bundle, tmp_path: Path, path: Path) -> None:
    other = make_tiny_checkpoint(tmp_path / "other", num_hidden_layers=3)
    scored = RowFile(tmp_path / "scores.jsonl", Scored)
    with pytest.raises(
        ConfigError, match=r"expected the checkpoint of tiny .*4, 64, 384.*got .*other .*3, 64, 384"
    ):
        score(
            SIZE,
            tiny_bundle,
            load=samples,
            scored=scored,
            run="run",
            progress=lambda _: None,
            model=str(other),
        )


def test_a_summary_has_a_row_for_each_system_and_set(path: Path) -> None:
    table = {(row.dataset, row.system): row for row in summary(RowFile(path, Scored))}
    assert list(table) == [(name, system) for name in TASKS for system in SYSTEMS]
    metrics = {name: table[name, FULL].metric for name in TASKS}
    assert metrics == {
        "boolq": "accuracy",
        "quac": "f1",
        "imdb": "accuracy",
        "xsum": "rougeL",
        "alpaca": "perplexity",
    }
    for name in TASKS:
        full = table[name, FULL]
        verified = table[name, VERIFIED]
        assert (full.agreement, full.identical, full.is_within_full, full.offload_rate) == (
            1.0,
            1.0,
            True,
            1.0,
        )
        assert (verified.value, verified.identical) == (full.value, 1.0)
        assert table[name, "standalone"].offload_rate == 0.0
        assert full.low <= full.value <= full.high
    assert table["boolq", FULL].details["majority"] == 0.5
    assert "auc" in table["boolq", CLOUD_ONLY].details


def scored(system: str, token_ids: tuple[int, ...], gap: float) -> Scored:
    return Scored(
        system=system,
        dataset="xsum",
        sample=1,
        run="r",
        text="",
        token_ids=token_ids,
        tokens_from={},
        gap=gap,
    )


def test_verified_answers_that_differ_are_listed_with_what_excuses_them() -> None:
    full = scored(FULL, (1, 2, 3), 0.0)
    assert verified_differences([full, scored(VERIFIED, (1, 2, 3), 0.0)]) == []
    for gap, is_tie in ((1e-4, True), (0.1, False)):
        expected = Difference(dataset="xsum", sample=1, gap=gap, is_tie=is_tie)
        assert verified_differences([scored(VERIFIED, (1, 9, 3), gap), full]) == [expected]


def test_the_judge_knows_the_probability_of_every_token(tiny_bundle: Bundle) -> None:
    whole = WholeModel(tiny_bundle, num_threads=1)
    token_ids = []
    expected = []
    for token_id, logits in whole.steps(PROMPTS[0], 6):
        token_ids.append(token_id)
        expected.append(-float(torch.log_softmax(logits, -1)[token_id]))
    prompt_ids = ChatTokenizer(tiny_bundle).encode_chat([ChatMessage("user", PROMPTS[0])])
    reading = FullModel(tiny_bundle, 1).read(prompt_ids, 6)
    other = reading.judge([(token_ids[0] + 1) % 384, *token_ids[1:]])
    assert other.agreement < 1.0
    assert other.gap > 0.0
    verdict = reading.judge(token_ids)
    assert verdict.nll == pytest.approx(np.mean(expected), rel=1e-4)
    assert (verdict.agreement, verdict.gap) == (1.0, 0.0)
    assert reading.judge(token_ids[:1]).nll == pytest.approx(expected[0], rel=1e-4)


def test_a_choice_that_no_exit_names_is_at_most_as_likely_as_its_least_candidate() -> None:
    candidates = ExitCandidates(
        np.array([7, 3, 5]), np.log(np.array([0.5, 0.25, 0.125], np.float32)), 0.5
    )
    assert exit_preference(candidates, ([7, 5], [3])) == pytest.approx(np.log(0.625 / 0.25))
    assert exit_preference(candidates, ([7], [9])) == pytest.approx(np.log(0.5 / 0.125))


def test_a_prompt_fits_with_the_longest_answer(tiny_bundle: Bundle) -> None:
    is_fitting = fits(tiny_bundle, SIZE)
    assert is_fitting("x" * 300)
    assert not is_fitting("x" * 500)
