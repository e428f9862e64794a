"""Responses of devices, streamed to the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct
from rich.console import Console
from rich.text import Text

from fleet.bundles.manifest import Bundle
from fleet.cli.views import reply_text, usage_line
from fleet.errors import ConfigError
from fleet.protocol.modes import exit_source
from fleet.protocol.prompt import PromptRequest, Reply, Usage
from fleet.protocol.report import Switch
from fleet.server.home import FleetHome
from fleet.transport.prompt_client import PromptClient


class PromptResult(Struct, frozen=True, kw_only=True):
    """One response of `fleet demo` or `fleet prompt`."""

    prompt: str
    text: str
    token_ids: list[int]
    finish_reason: str
    sources: dict[str, int]
    offload_rate: float
    bytes_up: int
    bytes_down: int
    ttft_ms: float
    tpot_ms: float
    round_trips: int
    drafted: int
    switches: tuple[Switch, ...]


def stream_response(
    console: Console,
    client: PromptClient,
    device: str,
    request: PromptRequest,
    exits: Sequence[str],
    picture: Console | None = None,
) -> PromptResult:
    """Send a request and print the response while it arrives; the whole response.

    `exits` are the sources of the device's exits in order of depth. `picture` gets the response in
    one piece, which wraps.
    """
    replies = []
    for reply in client.ask(device, request):
        replies.append(reply)
        console.print(reply_text(reply, exits), end="", soft_wrap=True)
    usage = _usage_of(device, replies[-1])
    line = usage_line(usage, replies[-1].note)
    console.print()
    console.print(line)
    if picture:
        response = Text().join(reply_text(reply, exits) for reply in replies)
        picture.print(response, line, sep="\n")
    return _result(request, replies, usage)


def _usage_of(device: str, last: Reply) -> Usage:
    if last.usage is None:
        raise ConfigError(
            f"device {device} ended its response without counts; is it of another version?"
        )
    return last.usage


def _result(request: PromptRequest, replies: Sequence[Reply], usage: Usage) -> PromptResult:
    return PromptResult(
        prompt=request.chat[-1].content,
        text="".join(reply.text for reply in replies),
        token_ids=[reply.token_id for reply in replies if reply.token_id is not None],
        finish_reason=replies[-1].finish_reason or "",
        sources=usage.sources,
        offload_rate=usage.offload_rate,
        bytes_up=usage.bytes_up,
        bytes_down=usage.bytes_down,
        ttft_ms=usage.ttft_ms,
        tpot_ms=usage.tpot_ms,
        round_trips=usage.round_trips,
        drafted=usage.drafted,
        switches=usage.switches,
    )


def exit_sources(home: FleetHome, bundle_id: str) -> list[str]:
    """The sources of a bundle's exits in order of depth; none for a bundle that is not here."""
    folder = home.bundle_folder(bundle_id)
    if folder is None:
        return []
    return [exit_source(layer) for layer in Bundle.load(folder, ()).manifest.exits]
