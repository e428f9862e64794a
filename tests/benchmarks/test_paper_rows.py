"""Rows of the paper's experiments survive any end of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.paper.rows import RowFile, Scored
from fleet.errors import ConfigError


def scored(sample: int) -> Scored:
    return Scored(
        system="verified", dataset="boolq", sample=sample, run="r", text="yes", token_ids=(1, 2),
        tokens_from={"cloud": 2}, score=1.0, label=1,
    )  # fmt: skip


def test_rows_are_there_again(tmp_path: Path) -> None:
    rows = RowFile(tmp_path / "new" / "scores.jsonl", Scored)
    rows.add(scored(1))
    rows.add(scored(2))
    again = RowFile(tmp_path / "new" / "scores.jsonl", Scored)
    assert list(again) == list(rows) == [scored(1), scored(2)]
    assert scored(2).key in again
    assert scored(3).key not in again


def test_a_torn_line_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    RowFile(path, Scored).add(scored(1))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:30])
    rows = RowFile(path, Scored)
    assert list(rows) == [scored(1)]
    rows.add(scored(2))
    assert list(RowFile(path, Scored)) == [scored(1), scored(2)]


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text('{"system": 1}\n')
    with pytest.raises(ConfigError, match="line 1: expected a row of this version"):
        RowFile(path, Scored)
