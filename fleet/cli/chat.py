"""`fleet chat`: an interactive conversation with one device."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console

from fleet.cli.online_device import OnlineDevice, online_device
from fleet.cli.options import (
    DeviceArgument,
    FrequencyOption,
    HomeOption,
    MinPOption,
    ModeOption,
    PresenceOption,
    RepetitionOption,
    SeedOption,
    SmoothOption,
    StopOption,
    TemperatureOption,
    ThresholdOption,
    TokensOption,
    TopKOption,
    TopPOption,
    make_request,
)
from fleet.cli.responses import follow_response, print_usage
from fleet.cli.views import legend
from fleet.errors import ConfigError, FleetError, PromptError, RefusedPromptError
from fleet.protocol.prompt import ChatMessage, PromptRequest, Reply
from fleet.transport.prompt_client import Prompter
from fleet.utils.console import new_console, outside_text
from fleet.utils.printable import count
from fleet.utils.text import is_blank

HINT: Final = "/help lists the commands. Ctrl-C stops an answer, Ctrl-D ends the conversation."
HELP: Final = """\
/system TEXT  set the system prompt; without TEXT, remove it
/reset        clear the conversation; the system prompt stays
/quit         end the conversation, as Ctrl-D does
//TEXT        send /TEXT to the device
Ctrl-C stops an answer. The arrow keys edit a line and bring earlier ones back."""


def chat(
    device: DeviceArgument,
    mode: ModeOption = None,
    threshold: ThresholdOption = None,
    max_new_tokens: TokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = None,
    min_p: MinPOption = None,
    repetition_penalty: RepetitionOption = None,
    presence_penalty: PresenceOption = None,
    frequency_penalty: FrequencyOption = None,
    stop: StopOption = None,
    smooth_stream: SmoothOption = True,
    folder: HomeOption = None,
) -> None:
    """Converse with a device. /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends it."""
    base = make_request(
        None,
        mode=mode,
        threshold=threshold,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        stop=stop,
    )
    converse(folder, device, base, is_smooth=smooth_stream)


def converse(folder: Path | None, device: str, base: PromptRequest, *, is_smooth: bool) -> None:
    """Connect to the device, and hold a conversation until the end of the input.

    Raises:
        ConfigError: the device's model has no chat template.
        FleetError: as `online_device`.
    """
    console = new_console()
    with online_device(folder, device) as target:
        check_can_chat(target)
        exits = target.exit_sources
        console.print(legend(exits))
        Conversation(console, target.client, device, base, exits, is_smooth=is_smooth).run()


def check_can_chat(target: OnlineDevice) -> None:
    """Raise ConfigError if a device's bundle is known and has no chat template."""
    if target.prompt_format == "raw":
        raise ConfigError(
            f"device {target.name} serves {target.model}, which has no chat template and "
            f"continues a text; use fleet prompt {target.name} 'The beginning of a text'"
        )


class Conversation:
    """The turns of one conversation. `base` has the options of each request. With `is_smooth` the
    answers are printed at a steady pace.

    A turn that the device refuses, and one that is stopped before its first text, are not kept.
    """

    def __init__(
        self,
        console: Console,
        client: Prompter,
        device: str,
        base: PromptRequest,
        exits: Sequence[str],
        *,
        is_smooth: bool = False,
    ) -> None:
        self._is_smooth = is_smooth
        self._console = console
        self._client = client
        self._device = device
        self._base = base
        self._exits = exits
        self._system: tuple[ChatMessage, ...] = ()
        self._turns: tuple[ChatMessage, ...] = ()  # alternately of user and assistant
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self._note(HELP),
            "/system": self._set_system,
            "/reset": self._reset,
        }

    def run(self) -> None:
        """Read lines from the terminal until /quit or the end of the input."""
        with suppress(ImportError):  # of a Python without it; lines then have no history
            import readline  # noqa: F401 (from now on `input` edits lines and keeps them)
        if isinstance(sys.stdin, io.TextIOWrapper):
            # An error of the decoder would lose the lines after it.
            sys.stdin.reconfigure(errors="surrogateescape")
        self._note(HINT)
        while (line := _read_line()) not in (None, "/quit"):
            try:
                self.handle(line or "")
            except KeyboardInterrupt:  # before the answer began
                self._note("stopped")

    def handle(self, line: str) -> None:
        """Send a line to the device, or run its command."""
        command, _, argument = line.partition(" ")
        if is_blank(line):
            return
        if not line.startswith("/"):
            self._send(line)
        elif line.startswith("//"):
            self._send(line[1:])
        elif command in self._commands:
            self._commands[command](argument.strip())
        else:
            self._note(f"unknown command {command}; /help lists them, //TEXT sends /TEXT")

    def _set_system(self, text: str) -> None:
        self._system = (ChatMessage("system", text),) if text else ()
        self._note("the system prompt is set" if text else "there is no system prompt now")

    def _reset(self, _: str) -> None:
        num_turns = len(self._turns) // 2
        self._turns = ()
        self._note(f"the conversation is empty; {count(num_turns, 'turn')} cleared")

    def _send(self, text: str) -> None:
        """Send a turn; while the device refuses its length, without the older half of the rest."""
        turns = self._turns
        question = ChatMessage("user", text)
        try:
            while not self._try_turn(turns, question):
                num_dropped = (len(turns) // 2 + 1) // 2
                turns = turns[2 * num_dropped :]
                self._note(f"sending it without {count(num_dropped, 'turn')} from the start")
        except (FleetError, UnicodeEncodeError) as error:
            self._note(f"{error}\nthis turn is left out of the conversation")

    def _try_turn(self, turns: tuple[ChatMessage, ...], question: ChatMessage) -> bool:
        """Follow the answer to a turn after `turns`; False if the device may accept fewer.

        Raises:
            FleetError: the device refuses it for another reason, or is away.
        """
        with_question = (*turns, question)
        try:
            replies = self._follow(with_question)
        except RefusedPromptError as error:
            if error.code != PromptError.code or not turns:
                raise
            self._note(str(error))
            return False
        if text := "".join(reply.text for reply in replies):
            self._turns = (*with_question, ChatMessage("assistant", text))
        return True

    def _follow(self, turns: tuple[ChatMessage, ...]) -> list[Reply]:
        """Return the replies to a conversation: those before Ctrl-C if it stops the answer."""
        request = msgspec.structs.replace(self._base, messages=(*self._system, *turns))
        replies: list[Reply] = []
        response = follow_response(
            self._console,
            self._client,
            self._device,
            request,
            self._exits,
            is_smooth=self._is_smooth,
        )
        try:
            with closing(response):
                replies.extend(response)
        except KeyboardInterrupt:
            self._note("stopped")
            return replies
        print_usage(self._console, self._device, replies[-1])
        if replies[-1].finish_reason == "length" and self._base.max_new_tokens is None:
            self._note(
                "the answer reached its greatest length, or the device's room for a conversation; "
                "ask it to go on, or clear the conversation with /reset"
            )
        return replies

    def _note(self, text: str) -> None:
        self._console.print(outside_text(text, "dim"))


def _read_line() -> str | None:
    """Read a line of the user: "" if it is stopped with Ctrl-C, None at the end of the input."""
    print()
    try:
        line = input("> ").removeprefix("\ufeff").strip()  # a byte order mark
        line.encode()
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print("\nCtrl-D or /quit ends the conversation")
    except UnicodeEncodeError:
        print("this line is not in UTF-8, and is not sent; give the input in UTF-8")
    else:
        return line
    return ""
