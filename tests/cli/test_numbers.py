"""Numbers on the command line: each has a smallest and a largest value, and NaN is none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import pytest
import typer
from typer.testing import CliRunner

from cloud_broker_worker.worker.cli import app as worker
from edge_agent.cli import app as edge_agent
from fleet.cli import app as fleet
from onnx_export.__main__ import app as export

CHECKED: Final = frozenset(
    {
        "threshold",
        "top_p",
        "rtt",
        "bandwidth",
        "edge_step",
        "cloud_step",
        "min_agreement",
        "max_offload_increase",
        "max_agreement_drop",
        "max_error_rate",
        "max_tpot_ratio",
        "max_failed",
        "agreement_sample",
        "target_agreement",
        "confidence",
        "accept",
    }
)
"""Fractions that the commands themselves refuse; their tests are those of the commands."""


def parameters(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Each parameter of a command and of the commands below it, by the words that lead there."""
    for each in command.params:
        yield " ".join((*words, each.name)), each
    for name, below in getattr(command, "commands", {}).items():
        yield from parameters(below, (*words, name))


def test_each_number_has_a_smallest_and_a_largest_value() -> None:
    apps = {"fleet": fleet, "edge-agent": edge_agent, "worker": worker, "export": export}
    numbers = [
        (path, each)
        for name, app in apps.items()
        for path, each in parameters(typer.main.get_command(app), (name,))
        if each.type_descriptor.annotation in (int, float) and each.name not in CHECKED
    ]
    assert len(numbers) > 30
    assert [path for path, each in numbers if each.min is None or each.max is None] == []


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "1e300"])
def test_a_wait_is_no_infinity(value: str) -> None:
    result = CliRunner().invoke(worker, ["run", "/no/worker", f"--drain-timeout={value}"])
    assert result.exit_code == 2
    assert "Invalid value for '--drain-timeout'" in result.output
