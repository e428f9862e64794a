"""Names of devices and files on the command line: refused before a command begins."""

from __future__ import annotations

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from fleet.cli import app
from fleet.errors import ConfigError, TopicError
from fleet.protocol.prompt import PromptRequest
from fleet.transport.in_memory import InMemoryBroker
from fleet.transport.prompt_client import PromptClient

COMMAND = get_command(app)
NO_NAMES = ("+", "#", "kitchen/status", "Kitchen", "", "a\tb", "a" * 300)
COMMANDS = [
    ("prompt", "NAME", "hello"),
    ("chat", "NAME"),
    ("device", "NAME"),
    ("stats", "NAME"),
    ("stats", "--group", "NAME"),
    ("sessions", "NAME"),
    ("tag", "NAME", "floor=1"),
    ("allow", "NAME", "kitchen"),
    ("disallow", "NAME", "kitchen"),
    ("renew", "NAME"),
    ("suspend", "NAME"),
    ("resume", "NAME"),
    ("revoke", "NAME"),
    ("delete", "NAME"),
    ("config", "set", "NAME", "max_draft=2"),
    ("config", "set", "--group", "NAME", "max_draft=2"),
    ("config", "unset", "NAME", "max_draft"),
    ("config", "show", "NAME"),
    ("update", "rollout", "1.0", "NAME"),
    ("bundle", "rollout", "b1", "--canary-group", "NAME"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_refuses_what_cannot_be_a_name_before_it_needs_a_fleet(
    command: tuple[str, ...],
) -> None:
    for name in NO_NAMES:
        words = [name if word == "NAME" else word for word in command]
        with pytest.raises(TopicError, match="expected 1 to 63 characters of a-z, 0-9") as caught:
            COMMAND.main([*words, "--home", "/no/fleet"], standalone_mode=False)
        assert "enroll" not in str(caught.value)


def test_an_app_that_prompts_all_devices_at_once_is_refused() -> None:
    with (
        InMemoryBroker().connect("phone") as link,
        pytest.raises(TopicError, match="name '\\+': expected 1 to 63"),
    ):
        next(PromptClient(link).ask("+", PromptRequest(prompt="hello")))


def test_a_picture_of_another_kind_is_refused_before_the_demo_runs() -> None:
    with pytest.raises(ConfigError, match=r"--picture o\.png: expected a file named \*\.svg"):
        COMMAND.main(["demo", "--picture", "o.png"], standalone_mode=False)


@pytest.mark.parametrize(
    ("text", "is_text"), [("-5 degrees?", True), ("- an item", True), ("--treshold", False)]
)
def test_a_prompt_that_looks_like_an_option_is_told_of_the_two_dashes(
    text: str, is_text: bool
) -> None:
    result = CliRunner().invoke(app, ["prompt", "kitchen", text])
    assert result.exit_code == 2
    assert "No such option" in result.output
    assert ("put -- before a text that begins with a minus" in result.output) is is_text


def test_the_two_dashes_are_named_once_in_a_group_within_a_group() -> None:
    result = CliRunner().invoke(app, ["bundle", "rollback", "-1"])
    assert result.output.count("put -- before a text") == 1
