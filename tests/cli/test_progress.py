"""Progress is shown as lines where stderr is no terminal."""

from __future__ import annotations

import pytest

from fleet.cli.progress import progress_bar, stage_progress


def test_a_stage_has_lines_at_its_begin_and_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("answering", 300) as report:
        for done in (1, 2, 299, 300, 300):
            report(done)
    assert capsys.readouterr().err == "answering: 0 of 300\nanswering: 300 of 300\n"


def test_a_long_stage_has_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleet.cli.progress.LINE_S", 0.0)
    with progress_bar("answering", 3) as report:
        report(2)
    assert "answering: 2 of 3\n" in capsys.readouterr().err


def test_a_message_is_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with stage_progress() as report:
        report("memory: up to 4.1 GB [of each]", 0, 0)
    assert capsys.readouterr().err == "memory: up to 4.1 GB [of each]\n"
