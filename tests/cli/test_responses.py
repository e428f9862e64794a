"""The line of counts under an answer, and the options of its request."""

from __future__ import annotations

import importlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fleet.cli import app
from fleet.cli.options import make_request, read_response_format
from fleet.cli.views import logprob_tables, logprobs_of, reply_text, usage_line
from fleet.errors import ConfigError
from fleet.protocol.constraint import Constraint
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import (
    MAX_PROMPT_BYTES,
    Choice,
    PromptRequest,
    Reply,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from fleet.protocol.report import Switch
from fleet.server.home import FleetConfig, FleetHome

ALONE = Switch(0, Mode.STANDALONE, "the link is down")
BACK = Switch(9, Mode.COLLABORATIVE, "the link is back")
FIRST = "from token 0 on standalone: the link is down"


def make_usage(**changes: object) -> Usage:
    """Return the usage of one token."""
    values: dict[str, object] = {
        "prompt_tokens": 1,
        "tokens": 1,
        "sources": {},
        "offload_rate": 0.0,
        "bytes_up": 0,
        "bytes_down": 0,
        "ttft_ms": 1.0,
        "tpot_ms": 1.0,
    }
    return Usage(**values | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mode", "switches", "expected"),
    [
        (Mode.AUTO, (), ["auto began as collaborative]"]),
        (Mode.AUTO, (ALONE, BACK), [FIRST, "from token 9 on collaborative: the link is back]"]),
        (Mode.AUTO, (BACK,), ["auto began as collaborative", "from token 9 on"]),
        (Mode.VERIFIED, (), ["then 1 ms a token]"]),
    ],
)
def test_the_line_has_the_mode_that_auto_chose(
    mode: Mode, switches: tuple[Switch, ...], expected: list[str]
) -> None:
    words = usage_line(make_usage(mode=mode, switches=switches), None).plain.split("; ")[
        -len(expected) :
    ]
    for word, start in zip(words, expected, strict=True):
        assert start in word


def request_of(text: str, **fields: Any) -> PromptRequest:
    return make_request(
        text,
        mode=None,
        threshold=None,
        max_new_tokens=None,
        temperature=0.7,
        top_p=1.0,
        top_k=40,
        seed=None,
        **fields,
    )


def test_a_text_is_sent_as_a_prompt_which_models_without_a_template_accept() -> None:
    request = request_of("hi")
    assert request.prompt == "hi"
    assert not request.needs_template


def test_stop_texts_are_options_of_a_request() -> None:
    options = {"mode": None, "threshold": None, "max_new_tokens": None, "seed": None}
    plain = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "stream": False} | options
    request = make_request("hi", stop=["\n", "END"], **plain)  # type: ignore[arg-type]
    assert (request.stop, request.stream) == (("\n", "END"), False)
    for stop in ([""], ["a"] * 5, ["a" * 257]):
        with pytest.raises(ConfigError, match="--stop: expected up to 4 texts of 1 to 256"):
            make_request("hi", stop=stop, **plain)  # type: ignore[arg-type]


def test_top_k_is_an_option_of_a_request() -> None:
    assert request_of("hi").sampling.top_k == 40


@pytest.mark.parametrize("text", ["", " ", "\u200b", "\u3164"])
def test_a_prompt_without_a_visible_character_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="the prompt is empty"):
        request_of(text)


def test_a_schema_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "fruit.json"
    file.write_text('{"type": "object"}', encoding="utf-8")
    request = request_of("hi", response_format=read_response_format(file))
    assert request.constraint == Constraint("json_schema", b'{"type":"object"}')
    assert read_response_format(None) is None
    file.write_text("[1]", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"fruit\.json .*Expected .*; write a JSON schema"):
        read_response_format(file)


def test_a_bias_is_a_token_id_and_a_number() -> None:
    options = {"mode": None, "threshold": None, "temperature": 0.0, "top_p": 1.0}
    request = make_request("hi", logit_bias=["7=2.5", "8=-100"], **options)  # type: ignore[arg-type]
    assert request.logit_bias == {"7": 2.5, "8": -100.0}
    for text in ("7", "=1", "x=1", "7=101", "7=nan", "07=1", "7=1=1"):
        with pytest.raises(ConfigError, match="expected a token id and -100 to 100, such as 42"):
            make_request("hi", logit_bias=[text], **options)  # type: ignore[arg-type]


def test_choices_are_printed_with_their_numbers() -> None:
    choices = (
        Choice(index=0, full_text="one", finish_reason="stop"),
        Choice(index=1, full_text="t\x1bwo", finish_reason="length"),
    )
    reply = Reply(seq=0, done=True, choices=choices)
    assert reply_text(reply, []).plain == "1: one\n2: t\\x1bwo"


def tables_of(replies: list[Reply]) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    for table in logprob_tables(replies):
        console.print(table)
    return console.export_text()


def test_each_token_is_printed_with_its_log_probability_and_the_best_tokens() -> None:
    tops = (TopLogprob(" a", 1, -0.25), TopLogprob("\x1b", 2, -1.5))
    replies = [
        Reply(seq=0, text=" a", logprobs=(TokenLogprob(" a", 1, -0.25, tops),)),
        Reply(seq=1, text="b\n", logprobs=(TokenLogprob("b\n", 3, -2.0),)),
        Reply(seq=2, done=True),
    ]
    assert [each.token for each in logprobs_of(replies)] == [" a", "b\n"]
    text = tables_of(replies)
    assert re.search(r"' a' +│ +-0\.250 +│ ' a' -0\.250  '\\x1b' -1\.500", text)
    assert re.search(r"'b\\n' +│ +-2\.000", text)
    assert tables_of([Reply(seq=0, done=True)]) == ""


def test_each_choice_has_a_table_of_its_log_probabilities() -> None:
    choices = [
        Choice(
            index=index,
            full_text="a",
            finish_reason="stop",
            logprobs=(TokenLogprob("a", 1, -1.0 - index),),
        )
        for index in (0, 1)
    ]
    text = tables_of([Reply(seq=0, done=True, choices=tuple(choices))])
    assert re.search(r"choice 1\s.*-1\.000.*choice 2\s.*-2\.000", text, re.DOTALL)
    assert "best tokens" not in text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], (False, 0, None)),
        (["--logprobs"], (True, 0, None)),
        (["--top-logprobs", "3", "--temperature", "0"], (True, 3, 0.0)),
    ],
)
def test_options_become_fields_of_the_request(
    options: list[str],
    expected: tuple[bool, int, float | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[PromptRequest] = []
    module = importlib.import_module("fleet.cli.prompt")  # next to the function
    monkeypatch.setattr(module, "send_prompt", lambda *words, **_: sent.append(words[2]))
    FleetHome.create(tmp_path, FleetConfig(host="127.0.0.1", port=1, bundle="/no/bundle"))
    arguments = ["prompt", "kitchen", "hi", "--home", str(tmp_path), *options]
    CliRunner().invoke(app, arguments)
    (request,) = sent
    assert (request.logprobs, request.top_logprobs, request.temperature) == expected


def test_a_prompt_on_stdin_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[PromptRequest] = []
    module = importlib.import_module("fleet.cli.prompt")  # next to the function
    monkeypatch.setattr(module, "send_prompt", lambda *words, **_: sent.append(words[2]))
    FleetHome.create(tmp_path, FleetConfig(host="127.0.0.1", port=1, bundle="/no/bundle"))
    arguments = ["prompt", "kitchen", "-", "--home", str(tmp_path)]
    CliRunner().invoke(app, arguments, input="\ufeffTwo\nlines\n")
    assert [request.prompt for request in sent] == ["Two\nlines"]
    result = CliRunner().invoke(app, arguments, input="a" * (MAX_PROMPT_BYTES + 1))
    assert "expected a prompt of at most" in str(result.exception)
