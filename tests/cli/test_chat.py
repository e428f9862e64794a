"""`fleet chat`: keys in a terminal, commands, and conversations longer than the device's room."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console

from edge_agent.config import AgentConfig
from fleet.bundles.manifest import Bundle
from fleet.cli.chat import Conversation
from fleet.protocol import topics
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import PromptRequest, parse_prompt
from fleet.utils.console import new_console
from tests.system.memory_fleet import DEVICE, MemoryFleet, memory_fleet
from tests.terminal import CTRL_C, CTRL_D, LEFT, UP, terminal

PROMPT = "\r\n> "
GREEN = "\x1b[32m"  # of the answer


class Chat:
    """A conversation with a device of 512 positions, its screen, and the requests it sent."""

    def __init__(self, fleet: MemoryFleet, bundle: Bundle) -> None:
        self.requests: list[PromptRequest] = []
        fleet.watcher.subscribe(
            topics.prompts_to(DEVICE), lambda _, p: self.requests.append(parse_prompt(p)), qos=1
        )
        fleet.start_device(bundle, AgentConfig(num_threads=1, mode=Mode.STANDALONE))
        self._screen = io.StringIO()
        console: Console = new_console(file=self._screen, width=80)
        request = PromptRequest(messages=(), max_new_tokens=8, ignore_eos=True)
        self._conversation = Conversation(console, fleet.client, DEVICE, request, [])

    def type(self, line: str) -> str:
        """Handle a line; what it printed, as one line."""
        begin = len(self._screen.getvalue())
        self._conversation.handle(line)
        return " ".join(self._screen.getvalue()[begin:].split())

    def read(self, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        """Converse with `data` as the input."""
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))
        self._conversation.run()

    def sent(self) -> list[tuple[str, str]]:
        """Roles and texts of the latest request's messages, without those of the assistant."""
        messages = self.requests[-1].chat
        return [(each.role, each.content or "") for each in messages if each.role != "assistant"]


@pytest.fixture
def chat(tiny_bundle: Bundle) -> Iterator[Chat]:
    with memory_fleet() as fleet:
        yield Chat(fleet, tiny_bundle)


def test_ctrl_c_ends_the_answer_and_not_the_conversation(tiny_bundle: Bundle) -> None:
    command = [sys.executable, "-m", "tests.cli.chat_process", str(tiny_bundle.folder)]
    with terminal(command) as screen:
        screen.wait(PROMPT)
        screen.type("hello\n", GREEN)
        assert "stopped" in screen.type(CTRL_C, PROMPT)
        screen.type("half a line", "half a line")
        assert "Ctrl-D or /quit ends" in screen.interrupt_input(PROMPT)
        screen.type(CTRL_D, "ended: cancelled")


def test_arrow_keys_edit_a_line_and_bring_back_earlier_ones(tiny_bundle: Bundle) -> None:
    command = [sys.executable, "-m", "tests.cli.chat_process", str(tiny_bundle.folder)]
    with terminal(command) as screen:
        screen.wait(PROMPT)
        assert "unknown command /ac" in screen.type("/ac\n", "TEXT sends")
        assert "unknown command /abc" in screen.type(UP + LEFT + "b\n", "TEXT sends")
        screen.type("hello\n", GREEN)
        screen.type(CTRL_C, "stopped")
        screen.type("/quit\n", "ended: cancelled")


def test_a_command_does_not_go_to_the_model(chat: Chat) -> None:
    assert "/system TEXT set the system prompt" in chat.type("/help")
    assert "unknown command /retry; /help lists them" in chat.type("/retry now")
    assert chat.type("") == ""
    assert chat.type("\u200b") == ""
    assert not chat.requests
    chat.type("//etc is a folder")
    assert chat.sent() == [("user", "/etc is a folder")]


def test_a_byte_order_mark_before_a_command_does_not_count(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat.read(b"\xef\xbb\xbf/quit\nhello\n", monkeypatch)
    assert not chat.requests


def test_a_line_that_is_not_in_utf_8_is_left_out_and_the_next_one_is_sent(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat.read(b"caf\xe9\nhello\n", monkeypatch)
    assert "this line is not in UTF-8, and is not sent" in capsys.readouterr().out
    assert len(chat.requests) == 1
    assert chat.sent() == [("user", "hello")]


def test_a_system_prompt_leads_each_request_and_survives_a_reset(chat: Chat) -> None:
    assert chat.type("/system be brief") == "the system prompt is set"
    chat.type("hi")
    chat.type("again")
    assert chat.sent() == [("system", "be brief"), ("user", "hi"), ("user", "again")]
    assert chat.type("/reset") == "the conversation is empty; 2 turns cleared"
    chat.type("anew")
    assert chat.sent() == [("system", "be brief"), ("user", "anew")]
    assert chat.type("/system") == "there is no system prompt now"
    chat.type("more")
    assert chat.sent() == [("user", "anew"), ("user", "more")]


def test_a_conversation_longer_than_the_devices_room_goes_on_without_its_oldest_turns(
    chat: Chat,
) -> None:
    for letter in "abc":
        chat.type(letter * 120)
    printed = chat.type("d" * 120)
    assert "this device holds 512 positions" in printed
    assert "sending it without 2 turns from the start" in printed
    assert [text[0] for _, text in chat.sent()] == ["c", "d"]
    chat.type("e")
    assert [text[0] for _, text in chat.sent()] == ["c", "d", "e"]


def test_a_turn_that_the_device_never_accepts_is_left_out(chat: Chat) -> None:
    chat.type("hi")
    printed = chat.type("x" * 600)
    assert "sending it without 1 turn from the start" in printed
    assert printed.endswith("this turn is left out of the conversation")
    chat.type("again")
    assert chat.sent() == [("user", "hi"), ("user", "again")]
