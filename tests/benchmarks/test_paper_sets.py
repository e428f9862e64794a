"""Samples of every form of row, from files and through the hub's library, without a network."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.paper.sets import load_samples
from benchmarks.paper.tasks import Sample
from fleet.errors import ConfigError, MissingExtraError

PASSAGE = "Ann was born in 1983 in Rome. She had two cats, Tom and Jim. CANNOTANSWER"
DIALOGUE = {
    "context": PASSAGE,
    "questions": ["When was Ann born?", "Where does she live?"],
    "answers": {"texts": [["in 1983", "1983", "1983"], ["CANNOTANSWER"]]},
}
JOINED = {
    "passage": PASSAGE.removesuffix(" CANNOTANSWER"),
    "question": "question1: Where does she live?\nquestion2: What did she have?",
    "answer": "possible answers for question1:\nCANNOTANSWER CANNOTANSWER\n"
    "possible answers for question2:\ntwo cats, Tom two cats, She had two cats,",
}


def write(folder: Path, name: str, rows: Sequence[Any]) -> Path:
    (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return folder


def only(folder: Path, name: str, row: Any) -> Sample:
    (sample,) = load_samples(name, 1, 0, write(folder, name, [row]))
    return sample


@pytest.mark.parametrize(
    ("name", "row", "label"),
    [
        ("boolq", {"passage": "P.", "question": "is it so", "answer": True}, 1),
        ("boolq", {"passage": "P.", "question": "is it so", "answer": "False"}, 0),
        ("imdb", {"text": "Good.", "label": 1}, 1),
        ("imdb", {"text": "Bad.", "label": "Negative"}, 0),
    ],
)
def test_labels_are_numbers_or_words(
    tmp_path: Path, name: str, row: dict[str, Any], label: int
) -> None:
    assert only(tmp_path, name, row).label == label


@pytest.mark.parametrize(
    ("row", "prompt", "references"),
    [
        ({"turns": ["Why?"], "reference": ["So."]}, "Why?", ("So.",)),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n1 2", ("3",)),
        ({"instruction": "Sing.", "input": "", "output": ""}, "Sing.", ()),
    ],
)
def test_instructions_are_the_prompt(
    tmp_path: Path, row: dict[str, Any], prompt: str, references: tuple[str, ...]
) -> None:
    sample = only(tmp_path, "alpaca", row)
    assert (sample.prompt, sample.references) == (prompt, references)


def test_an_article_has_its_summary(tmp_path: Path) -> None:
    sample = only(tmp_path, "xsum", {"document": "It rained.", "summary": "Rain."})
    assert "It rained." in sample.prompt
    assert sample.references == ("Rain.",)


def test_a_dialogue_gives_a_question_that_the_text_answers(tmp_path: Path) -> None:
    sample = only(tmp_path, "quac", DIALOGUE)
    assert "When was Ann born?" in sample.prompt
    assert "Where" not in sample.prompt
    assert "CANNOTANSWER" not in sample.prompt
    assert sample.references == ("in 1983", "1983")


def test_joined_references_are_cut_where_the_passage_has_the_pieces(tmp_path: Path) -> None:
    sample = only(tmp_path, "quac", JOINED)
    assert "Where does she live?\nAnswer: unknown\n" in sample.prompt
    assert sample.references == ("two cats, Tom", "two cats,", "She had two cats,")


def test_a_dialogue_without_such_a_question_is_passed_over(tmp_path: Path) -> None:
    unanswered = DIALOGUE | {"questions": ["Where?"], "answers": {"texts": [["CANNOTANSWER"]]}}
    samples = load_samples(
        "quac", 5, 0, write(tmp_path, "quac", [unanswered, DIALOGUE, unanswered])
    )
    assert [sample.id for sample in samples] == [1]


def test_fewer_samples_are_the_first_of_more(tmp_path: Path) -> None:
    folder = write(tmp_path, "alpaca", [{"turns": [f"Prompt {i}"]} for i in range(20)])
    samples = load_samples("alpaca", 20, 3, folder)
    assert load_samples("alpaca", 4, 3, folder) == samples[:4]
    assert load_samples("alpaca", 4, 4, folder) != samples[:4]
    assert sorted(sample.id for sample in samples) == list(range(20))


def test_long_prompts_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = write(tmp_path, "alpaca", [{"turns": ["x" * n]} for n in (5, 50, 500)])
    said: list[str] = []
    samples = load_samples(
        "alpaca", 3, 0, folder, fits=lambda prompt: len(prompt) < 50, progress=said.append
    )
    assert [sample.id for sample in samples] == [0]
    assert said == ["alpaca: 2 prompts are too long and were left out"]
    with pytest.raises(ConfigError, match="none that fit"):
        load_samples("alpaca", 3, 0, folder, fits=lambda _: False)


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("boolq", {"passage": "P.", "answer": True}, "no 'question'"),
        ("boolq", {"passage": "P.", "question": "is it", "answer": "perhaps"}, "got 'perhaps'"),
        ("imdb", {"text": "Good.", "label": 2}, "expected one of positive"),
        ("xsum", {"document": "D.", "summary": None}, "expected text, got None"),
        ("alpaca", {"turns": []}, "index out of range"),
        ("alpaca", 5, "not iterable"),
        ("quac", {"context": "C.", "questions": ["a", "b"], "answers": [["x"]]}, "shorter than"),
        ("quac", JOINED | {"answer": "nothing"}, "shorter than"),
    ],
)
def test_a_row_of_another_kind_is_named_by_its_line(
    tmp_path: Path, name: str, row: Any, reason: str
) -> None:
    folder = write(tmp_path, name, [row])
    path = folder / f"{name}.jsonl"
    path.write_text("\n" + path.read_text())
    with pytest.raises(
        ConfigError, match=f"{name}.jsonl, line 2: expected a row of {name}.*{reason}"
    ):
        load_samples(name, 1, 0, folder)


def test_what_is_no_json_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "imdb.jsonl").write_text('{"text": "Good.", "label": 1}\n{"text": \n')
    with pytest.raises(ConfigError, match=r"imdb\.jsonl, line 2: expected a JSON object"):
        load_samples("imdb", 1, 0, tmp_path)


def test_a_missing_file_is_reported_with_its_expected_content(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"imdb\.jsonl or a folder .*imdb, found neither; see docs"
    ):
        load_samples("imdb", 1, 0, tmp_path)


def test_an_unknown_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown data set 'glue': expected one of boolq, quac"):
        load_samples("glue", 1, 0, tmp_path)


def test_the_library_of_the_hub_gives_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [DIALOGUE | {"dialogue_id": str(i)} for i in range(3)]
    (tmp_path / "files").mkdir()
    expected = load_samples("quac", 2, 0, write(tmp_path / "files", "quac", rows))
    copy = tmp_path / "copies" / "quac" / "plain_text" / "validation"
    copy.mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(copy / "0000.parquet")
    assert load_samples("quac", 2, 0, tmp_path / "copies") == expected
    (tmp_path / "copies" / "boolq").mkdir()
    with pytest.raises(ConfigError, match=r"cannot load the data set .*boolq, split validation"):
        load_samples("boolq", 1, 0, tmp_path / "copies")


def test_a_hub_that_cannot_be_reached_points_to_files(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def unreachable(*_: Any, timeout: float, **__: Any) -> None:
        assert timeout <= 10
        raise OSError("no route to host")

    monkeypatch.setattr(hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(
        ConfigError,
        match=r"google/boolq cannot be fetched .*no route to host.*put boolq\.jsonl into",
    ):
        load_samples("boolq", 1, 0, None)


def test_without_the_library_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "imdb").mkdir()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"cecollm-fleet\[bench\]"):
        load_samples("imdb", 1, 0, tmp_path)
