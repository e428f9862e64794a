"""Responses of devices, streamed to the terminal."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing

from msgspec import Struct
from rich.console import Console
from rich.text import Text

from fleet.cli.trace_view import trace_views, traces_of
from fleet.cli.views import logprob_tables, logprobs_of, reply_text, usage_line
from fleet.cli.word_wrap import WordWrap
from fleet.errors import ConfigError
from fleet.protocol.answer_trace import ReplyTrace
from fleet.protocol.prompt import (
    Choice,
    PromptRequest,
    Reply,
    SamplingOptions,
    TokenLogprob,
    Usage,
)
from fleet.protocol.report import Switch
from fleet.transport.prompt_client import Prompter
from fleet.transport.smooth_stream import paced


class PromptResult(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One response of `fleet demo` or `fleet prompt`; `choices` if there are several.

    `logprobs` has each token of the response, and `trace` each reply, if the request asks for them.
    """

    prompt: str
    text: str
    token_ids: list[int]
    finish_reason: str
    sources: dict[str, int]
    offload_rate: float
    prompt_tokens: int
    reused_tokens: int
    bytes_up: int
    bytes_down: int
    ttft_ms: float
    tpot_ms: float
    round_trips: int
    drafted: int
    seed: int | None
    switches: tuple[Switch, ...]
    sampling: SamplingOptions | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    choices: tuple[Choice, ...] | None = None
    trace: tuple[ReplyTrace, ...] | None = None


def stream_response(
    console: Console,
    client: Prompter,
    device: str,
    request: PromptRequest,
    exits: Sequence[str],
    picture: Console | None = None,
    *,
    is_smooth: bool = False,
) -> PromptResult:
    """Send a request and print the response while it arrives; the whole response.

    `exits` are the sources of the device's exits in order of depth. `picture` gets the response in
    one piece, which wraps.
    """
    arriving = follow_response(console, client, device, request, exits, is_smooth=is_smooth)
    replies = list(arriving)
    for table in logprob_tables(replies):
        console.print(table)
    for view in trace_views(traces_of(replies)):
        console.print(view)
    usage, line = print_usage(console, device, replies[-1])
    if picture:
        response = Text().join(reply_text(reply, exits) for reply in replies)
        picture.print(response, line, sep="\n")
    return _result(request, replies, usage)


def follow_response(
    console: Console,
    client: Prompter,
    device: str,
    request: PromptRequest,
    exits: Sequence[str],
    *,
    is_smooth: bool = False,
) -> Generator[Reply, None, None]:
    """Send a request, and yield its replies while their text is printed, with `is_smooth` at a
    steady pace.

    Closing the generator, or an exception in it, cancels the request at the device.
    """
    wrap = WordWrap(console)
    arriving = client.ask(device, request)
    with closing(paced(arriving) if is_smooth else arriving) as replies:
        try:
            for reply in replies:
                text = reply_text(reply, exits)
                wrap.print(text.plain, str(text.style))
                yield reply
        finally:
            wrap.end()


def print_usage(console: Console, device: str, last: Reply) -> tuple[Usage, Text]:
    """Print the counts of a response, which its last reply has; return them and the line.

    Raises:
        ConfigError: it has none.
    """
    if last.usage is None:
        raise ConfigError(
            f"device {device} ended its response without counts; is it of another version?"
        )
    line = usage_line(last.usage, last.note)
    console.print(line)
    return last.usage, line


def _result(request: PromptRequest, replies: Sequence[Reply], usage: Usage) -> PromptResult:
    return PromptResult(
        prompt=request.chat[-1].content or "",
        text="".join(reply.text for reply in replies),
        token_ids=[reply.token_id for reply in replies if reply.token_id is not None],
        finish_reason=replies[-1].finish_reason or "",
        sources=usage.sources,
        offload_rate=usage.offload_rate,
        prompt_tokens=usage.prompt_tokens,
        reused_tokens=usage.reused_tokens,
        bytes_up=usage.bytes_up,
        bytes_down=usage.bytes_down,
        ttft_ms=usage.ttft_ms,
        tpot_ms=usage.tpot_ms,
        round_trips=usage.round_trips,
        drafted=usage.drafted,
        seed=usage.seed,
        switches=usage.switches,
        sampling=usage.sampling,
        logprobs=logprobs_of(replies) or None,
        choices=replies[-1].choices,
        trace=traces_of(replies) or None,
    )
