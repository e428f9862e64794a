"""The tiny model's graphs as the benchmark makes them, and its own answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.fidelity import ReferenceAnswer, greedy_answers
from benchmarks.graphs import EdgeGraphs

TEXTS = ("Why is the sky blue?", "Name three fruits.", "Write one line about rain.")


@pytest.fixture(scope="session")
def tiny_graphs(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> EdgeGraphs:
    """Make edges of the tiny model, each once."""
    return EdgeGraphs(lambda _: None, str(tiny_checkpoint), tmp_path_factory.mktemp("graphs"))


@pytest.fixture(scope="session")
def tiny_answers(tiny_graphs: EdgeGraphs) -> list[ReferenceAnswer]:
    """The tiny model's greedy answers in float32, by PyTorch."""
    return greedy_answers(*tiny_graphs.model(), TEXTS, lambda _: None)
