"""`fleet chat`: an interactive conversation with one device."""

from __future__ import annotations

from typing import Final

import msgspec
from rich.console import Console

from fleet.cli import exits_served, online_device
from fleet.cli.demo import follow
from fleet.cli.views import legend
from fleet.errors import PromptError
from fleet.protocol.prompt import ChatMessage, PromptRequest
from fleet.server.home import FleetHome
from fleet.transport.mqtt import MqttTransport
from fleet.transport.prompt_client import PromptClient

RESET: Final = "/reset"


def converse(fleet: FleetHome, device: str, base: PromptRequest) -> None:
    """Reads turns from the terminal until an empty line or end of input; a refused turn is shown and forgotten."""
    exits = exits_served(fleet, online_device(fleet, device).bundle_id)
    console = Console(highlight=False)
    console.print(legend(exits))
    messages: tuple[ChatMessage, ...] = ()
    with fleet.operator() as identity, MqttTransport.connect(identity) as link:
        client = PromptClient(link)
        while turn := _read_turn(console):
            if turn == RESET:
                messages = ()
                continue
            asked = (*messages, ChatMessage("user", turn))
            try:
                result = follow(
                    console, client, device, msgspec.structs.replace(base, messages=asked), exits
                )
                messages = (*asked, ChatMessage("assistant", result.text))
            except PromptError as error:
                console.print(f"{error}")


def _read_turn(console: Console) -> str:
    try:
        return console.input("\n> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""
