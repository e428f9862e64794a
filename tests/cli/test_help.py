"""`--help` at 80 columns: sections, and descriptions that are not cut."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from edge_agent.cli import app as edge_agent
from fleet.cli import app as fleet
from fleet.utils.command_group import DEFAULT_SECTION


def help_of(app: typer.Typer, *arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments, "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    return result.stdout


def test_each_command_is_in_a_section() -> None:
    text = help_of(fleet)
    assert "Send prompts:\n  prompt " in text
    assert f"{DEFAULT_SECTION}:" not in text


@pytest.mark.parametrize(
    ("app", "arguments", "ending"),
    [
        (fleet, (), "prompt it follow."),
        (fleet, ("config",), "decides again."),
        (edge_agent, (), "to be started again."),
    ],
)
def test_no_description_is_cut(app: typer.Typer, arguments: tuple[str, ...], ending: str) -> None:
    text = help_of(app, *arguments)
    commands = text.split("Options:")[1].replace("COMMAND [ARGS]...", "")
    assert "..." not in commands
    assert ending in " ".join(text.split())
    assert max(len(line) for line in text.splitlines()) <= 80
