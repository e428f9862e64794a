"""`fleet prompt`: one prompt to one device."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fleet.cli.online_device import online_device
from fleet.cli.options import (
    BiasOption,
    DeviceArgument,
    FrequencyOption,
    HomeOption,
    JsonOption,
    MinPOption,
    ModeOption,
    PresenceOption,
    RegexOption,
    RepetitionOption,
    SchemaOption,
    SeedOption,
    SmoothOption,
    StopOption,
    TemperatureOption,
    ThresholdOption,
    TokensOption,
    TopKOption,
    TopPOption,
    make_request,
    print_json,
    read_response_format,
)
from fleet.cli.responses import stream_response
from fleet.errors import PromptError
from fleet.protocol.prompt import MAX_PROMPT_BYTES, PromptRequest
from fleet.protocol.types import MAX_TOP_LOGPROBS
from fleet.utils.console import new_console
from fleet.utils.text_files import decode_text

RawOption = Annotated[
    bool, typer.Option("--raw", help="Continue the text as it is; control tokens in it count.")
]
ChoicesOption = Annotated[
    int, typer.Option("--n", min=1, max=4, help="Number of answers, printed at their end.")
]
LogprobsOption = Annotated[
    bool, typer.Option("--logprobs", help="Also print the log-probability of each token.")
]
TopLogprobsOption = Annotated[
    int,
    typer.Option(
        "--top-logprobs",
        min=0,
        max=MAX_TOP_LOGPROBS,
        help="The same, with this number of best tokens at each position.",
    ),
]
TraceOption = Annotated[
    bool, typer.Option("--trace", help="Also print what device, link and cloud did when.")
]
StreamOption = Annotated[bool, typer.Option(help="Print the answer as it comes, or at its end.")]


def prompt(
    device: DeviceArgument,
    text: Annotated[str, typer.Argument(help="Text of the prompt; '-' reads it from stdin.")],
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
    logit_bias: BiasOption = None,
    schema: SchemaOption = None,
    regex: RegexOption = None,
    stop: StopOption = None,
    raw: RawOption = False,
    n: ChoicesOption = 1,
    logprobs: LogprobsOption = False,
    top_logprobs: TopLogprobsOption = 0,
    trace: TraceOption = False,
    stream: StreamOption = True,
    smooth_stream: SmoothOption = False,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prompt a device and stream its answer."""
    request = make_request(
        _read_stdin() if text == "-" else text,
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
        logit_bias=logit_bias,
        raw=raw,
        stop=stop,
        n=n,
        logprobs=logprobs or top_logprobs > 0,
        top_logprobs=top_logprobs,
        stream=stream and n == 1,
        response_format=read_response_format(schema),
        regex=regex,
        trace=trace,
    )
    send_prompt(folder, device, request, as_json=as_json, is_smooth=smooth_stream)


def _read_stdin() -> str:
    data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    if len(data) > MAX_PROMPT_BYTES:
        raise PromptError(f"expected a prompt of at most {MAX_PROMPT_BYTES:,} bytes on stdin")
    return decode_text(data, "the prompt on stdin").removesuffix("\n")


def send_prompt(
    folder: Path | None,
    device: str,
    request: PromptRequest,
    *,
    as_json: bool,
    is_smooth: bool = False,
) -> None:
    """Send a request as an operator and print the response.

    Raises:
        FleetError: as `online_device`, and as the client's `ask`.
    """
    console = new_console(stderr=as_json)
    with online_device(folder, device) as target:
        result = stream_response(
            console, target.client, device, request, target.exit_sources, is_smooth=is_smooth
        )
    if as_json:
        print_json({"bundle_id": target.bundle_id, "results": [result]})
