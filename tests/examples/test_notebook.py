"""The notebook runs, cell by cell, on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fleet.bundles.manifest import Bundle
from fleet.protocol.modes import Mode
from tests.default_bundle import make_default_bundle

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_every_cell_of_the_notebook_runs(
    tiny_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_default_bundle(tiny_bundle, tmp_path, monkeypatch)
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 4)
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            exec(compile("".join(cell["source"]), "notebook.ipynb", "exec"), names)
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[-len(Mode) :]] == list(Mode)
    assert printed.startswith("cloud  ")
