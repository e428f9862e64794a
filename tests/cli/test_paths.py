"""Paths on the command line: ``~`` is the home everywhere, and an empty path is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.edge import app as bench_edge
from benchmarks.paper.command import app as bench_paper
from cloud_broker_worker.worker.cli import app as worker
from edge_agent.cli import app as edge_agent
from fleet.cli import app as fleet
from fleet.utils.path_options import parse_path
from onnx_export.__main__ import app as export
from tests.cli.test_numbers import parameters

APPS = {
    "fleet": fleet,
    "edge-agent": edge_agent,
    "worker": worker,
    "export": export,
    "bench edge": bench_edge,
    "bench paper": bench_paper,
}


def paths() -> Iterator[tuple[str, Any]]:
    """Each parameter that is a path, or a list of them, by the words that lead there."""
    for name, app in APPS.items():
        for words, each in parameters(typer.main.get_command(app), (name,)):
            annotation = each.type_descriptor.annotation
            if Path in (annotation, *get_args(annotation)):
                yield words, each


def test_each_path_is_parsed_as_one_of_a_user() -> None:
    found = dict(paths())
    assert len(found) > 60
    parsers = {words: each.type_descriptor.parameter_info.parser for words, each in found.items()}
    assert [words for words, parser in parsers.items() if parser is not parse_path] == []


def test_a_tilde_after_an_equals_sign_is_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell leaves it as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    result = CliRunner().invoke(fleet, ["bundle", "verify", "~/b", "--key=~/key.pem"])
    assert f"{tmp_path / 'b'}" in result.output
    assert "~" not in result.output
    assert parse_path("~/b") == tmp_path / "b"
    result = CliRunner().invoke(fleet, ["backup", "~/none/", "--home=~/f"])
    assert "~/none/ is no folder; make it first" in str(result.exception)
    (tmp_path / "none").mkdir()
    result = CliRunner().invoke(fleet, ["backup", "~/none/", "--home=~/f"])
    assert f"no fleet in {tmp_path / 'f'}" in str(result.exception)


@pytest.mark.parametrize(
    ("app", "arguments", "option"),
    [
        (fleet, ["devices", "--home", ""], "'--home'"),
        (fleet, ["enroll", "kitchen", "--out="], "'--out'"),
        (fleet, ["bundle", "verify", ""], "'DIR'"),
        (fleet, ["backup", ""], ""),
        (edge_agent, ["join", "token", "--server=https://h:1", "--out", ""], "'--out'"),
        (worker, ["run", ""], "'folder'"),
        (export, ["--out", ""], "'--out'"),
    ],
)
def test_an_empty_path_is_refused(app: typer.Typer, arguments: list[str], option: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert (
        f"Invalid value{f' for {option}' if option else ''}: expected a path, got an empty text"
        in result.output
    )
