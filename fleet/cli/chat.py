"""`fleet chat`: an interactive conversation with one device."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
import typer
from rich.console import Console

from fleet.cli.console import new_console, outside_text
from fleet.cli.device_status import await_online
from fleet.cli.options import (
    HomeOption,
    ModeOption,
    SeedOption,
    TemperatureOption,
    ThresholdOption,
    TokensOption,
    TopPOption,
    make_request,
)
from fleet.cli.responses import exit_sources, stream_response
from fleet.cli.views import legend
from fleet.errors import PromptError
from fleet.protocol.prompt import ChatMessage, PromptRequest
from fleet.server.home import FleetHome
from fleet.transport.mqtt import MqttTransport
from fleet.transport.prompt_client import PromptClient

RESET: Final = "/reset"


def chat(
    device: Annotated[str, typer.Argument(help="Name of the device.")],
    mode: ModeOption = None,
    threshold: ThresholdOption = None,
    max_new_tokens: TokensOption = None,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = None,
    folder: HomeOption = None,
) -> None:
    """Converse with a device. /reset clears the conversation, an empty line or Ctrl-D ends it."""
    base = make_request(
        (),
        mode=mode,
        threshold=threshold,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    converse(FleetHome.load(folder), device, base)


def converse(home: FleetHome, device: str, base: PromptRequest) -> None:
    """Read turns from the terminal until an empty line or the end of input.

    The error of a refused turn is printed, and the turn is not part of the conversation.
    """
    console = new_console()
    messages: tuple[ChatMessage, ...] = ()
    with home.operator() as identity, MqttTransport.connect(identity) as link:
        exits = exit_sources(home, await_online(link, device).bundle_id)
        console.print(legend(exits))
        client = PromptClient(link)
        while turn := _read_turn(console):
            if turn == RESET:
                messages = ()
                continue
            with_turn = (*messages, ChatMessage("user", turn))
            request = msgspec.structs.replace(base, messages=with_turn)
            try:
                result = stream_response(console, client, device, request, exits)
                messages = (*with_turn, ChatMessage("assistant", result.text))
            except PromptError as error:
                console.print(outside_text(str(error)))


def _read_turn(console: Console) -> str:
    try:
        return console.input("\n> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""
