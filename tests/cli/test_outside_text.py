"""Text of users, devices and models on the operator's terminal: all of it, and it controls nothing.

`TEXT` has marks of the terminal library, codes of emoji, and control characters.
"""

from __future__ import annotations

import ast
import io
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fleet.cli import app
from fleet.cli.rollouts import progress_text
from fleet.cli.views import reply_text, usage_line
from fleet.errors import PromptError
from fleet.protocol.prompt import Reply
from fleet.protocol.report import ConfigProblem, DeviceStatus
from fleet.registry.results import RolloutRow
from fleet.server.home import FleetConfig, FleetHome
from fleet.utils.cli_runtime import run_command
from fleet.utils.console import new_console
from tests.cli.test_responses import make_usage
from tests.fleet.conftest import add

ROOT = Path(__file__).parents[2]
COMMANDS = ("fleet", "edge_agent", "cloud_broker_worker", "onnx_export", "benchmarks")
TEXT = "[/x] [red]t[/red] [json] [link=http://a] :smile: \x1b[31m \x1b]0;title\x07 {a}"
SHOWN = "[/x] [red]t[/red] [json] [link=http://a] :smile: \\x1b[31m \\x1b]0;title\\x07 {a}"
TEMPLATE = "[INST] Status is {payload} [/INST] Answer in [json] only."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "state"
    config = FleetConfig(host="127.0.0.1", port=1, bundle="/no/bundle")
    with FleetHome.create(path, config).registry() as registry:
        add(registry, "edge-1", group="kitchen")
        status = DeviceStatus(
            online=True,
            epoch=1,
            bundle_id="b",
            version="0.1.0",
            mode="auto",
            config_error=ConfigProblem("bad_bundle", TEXT, is_final=True),
            event_error=ConfigProblem("bad_prompt", f"event: {TEXT}", is_final=False),
        )
        registry.stats.record_status("edge-1", status, time.time())
    return path


def fleet(folder: Path, *arguments: str) -> str:
    environment = {"COLUMNS": "400", "NO_COLOR": "1"}
    result = CliRunner().invoke(app, [*arguments, "--home", str(folder)], env=environment)
    if result.exception is not None:
        raise result.exception
    return result.stdout


@pytest.mark.parametrize("arguments", [("config", "diff"), ("devices",), ("device", "edge-1")])
def test_a_devices_problem_is_shown_as_it_is(folder: Path, arguments: tuple[str, ...]) -> None:
    fleet(folder, "config", "set", "edge-1", "max_new_tokens=9")
    assert SHOWN in fleet(folder, *arguments)


def test_the_reason_of_a_dropped_event_is_shown(folder: Path) -> None:
    assert f"event: {SHOWN}" in fleet(folder, "devices")


def test_a_template_in_the_audit_log_is_shown_as_it_is(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "triggers.json"
    path.write_text(f'[{{"name": "t", "events": "sensor/+", "template": "{TEMPLATE}"}}]')
    fleet(folder, "config", "set", "edge-1", f"triggers=@{path}")
    assert TEMPLATE in fleet(folder, "audit")
    assert TEMPLATE in fleet(folder, "config", "show", "edge-1")


def printed(renderable: object) -> str:
    out = io.StringIO()
    new_console(file=out, width=400).print(renderable)
    return out.getvalue().rstrip()


def test_a_models_text_is_shown_as_it_is() -> None:
    usage = make_usage(round_trips=1)
    assert printed(reply_text(Reply(seq=0, text=TEXT, source="cloud"), [])) == SHOWN
    assert SHOWN in printed(usage_line(usage, TEXT))
    assert "1 token:" in printed(usage_line(usage, None))


def test_the_findings_of_a_rollout_are_shown_as_they_are() -> None:
    row = RolloutRow(
        id=1,
        bundle_id="b",
        group=None,
        state="waiting",
        stage=1,
        num_stages=2,
        num_targets=1,
        num_told=1,
        devices={},
        answers=0,
        findings=(TEXT,),
        doing=TEXT,
        reason="",
        started_at=0.0,
        stage_at=0.0,
        ended_at=None,
        plan={},
    )
    assert printed(progress_text(row, 1.0)).count(SHOWN) == 2


def test_the_line_of_an_error_controls_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise PromptError(TEXT)

    with pytest.raises(SystemExit):
        run_command("fleet", fail)
    assert capsys.readouterr().err == f"fleet: {SHOWN}\n"


def test_each_console_of_a_command_is_one_without_markup() -> None:
    files = [file for package in COMMANDS for file in (ROOT / package).rglob("*.py")]
    for path in files:
        if path.name == "console.py":
            continue
        nodes = ast.walk(ast.parse(path.read_text()))
        functions = [node.func for node in nodes if isinstance(node, ast.Call)]
        names = {function.id for function in functions if isinstance(function, ast.Name)}
        assert "Console" not in names, path


def test_a_path_of_two_lines_is_printed_as_one(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bundle", "verify", str(tmp_path / "a\nfleet: all is well")])
    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) == len(result.stderr.splitlines()) == 1
    (tmp_path / "b\nc").mkdir()
    (line,) = fleet(folder, "backup", str(tmp_path / "b\nc")).splitlines()
    assert "b\\nc" in line
