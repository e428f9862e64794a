"""Options and values that several commands of `fleet` share."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer

from fleet.errors import ConfigError
from fleet.exits.exit_policy import check_threshold
from fleet.protocol.constraint import JsonSchemaFormat, ResponseFormat
from fleet.protocol.modes import Mode, parse_mode
from fleet.protocol.prompt import PromptRequest, TokenKey
from fleet.protocol.topics import check_name
from fleet.protocol.types import DAY_S, Bias, StopTexts
from fleet.server.home import DEFAULT_PORT, DEFAULT_SERVICE_PORT, MAX_RETENTION_DAYS
from fleet.utils.free_memory import free_memory
from fleet.utils.path_options import path_option
from fleet.utils.printable import printable_json
from fleet.utils.text import is_blank
from fleet.utils.text_files import read_json

EPOCH_YEAR: Final = 1970
TO_THE_MINUTE: Final = "%Y-%m-%d %H:%M %Z"
TO_THE_SECOND: Final = "%Y-%m-%d %H:%M:%S"  # in a column of times in UTC
MAX_ROWS: Final = 1_000_000
MAX_TEMPERATURE: Final = 5.0
MAX_TOP_K: Final = 1000
MAX_NEW_TOKENS: Final = 100_000
MAX_SEED: Final = (1 << 63) - 1
MAX_COUNT: Final = 1_000_000_000
GB: Final = 1e9
MIN_MEMORY_GB: Final = 0.1
MAX_MEMORY_GB: Final = 100_000.0
UNITS_S: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": DAY_S}

PASS_ON: Final = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}
"""Context settings of a command that passes its arguments on, `--help` included."""


MemoryOption = Annotated[
    float | None,
    typer.Option(
        min=MIN_MEMORY_GB,
        max=MAX_MEMORY_GB,
        help="Memory in GB that all processes may use (default: half of what is free).",
    ),
]


def memory_bytes(memory_gb: float | None) -> int | None:
    """Return the bytes of `--memory`: by default half of what is free, or None if unknown."""
    if memory_gb is not None:
        return int(memory_gb * GB)
    free = free_memory()
    return None if free is None else free // 2


def checked_name(name: str | None) -> str | None:
    """Return the name of an argument. Raises TopicError before the command begins."""
    return None if name is None else check_name(name)


def checked_group(group: str | None) -> str | None:
    """Return the group of an option. Raises TopicError before the command begins."""
    return None if group is None else check_name(group, "group")


DeviceArgument = Annotated[str, typer.Argument(help="Name of the device.", callback=checked_name)]
OnlyDeviceArgument = Annotated[
    str | None, typer.Argument(help="Only of this device.", callback=checked_name)
]
HomeOption = Annotated[
    Path | None,
    path_option("--home", help="Fleet's folder (default: $FLEET_HOME, else the user's data)."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
GroupOption = Annotated[
    str | None,
    typer.Option("--group", help="Only the devices of this group.", callback=checked_group),
]
SinceOption = Annotated[str | None, typer.Option(help="Such as 30m, 24h, 7d, or 2026-01-31 (UTC).")]
PlotOption = Annotated[Path | None, path_option(help="Draw a picture into this *.png or *.svg.")]

PortOption = Annotated[
    int | None,
    typer.Option(min=1, max=65535, help=f"Port of the broker (default: {DEFAULT_PORT})."),
]
RegistryOption = Annotated[
    str | None,
    typer.Option(
        envvar="FLEET_REGISTRY",
        help="postgresql://USER@HOST/DATABASE (default: a SQLite file in the folder).",
    ),
]
RetentionOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MAX_RETENTION_DAYS,
        help="Days until single answers are deleted; hourly counts stay.",
    ),
]
MetricsPortOption = Annotated[
    int | None,
    typer.Option(min=0, max=65535, help="Serve /healthz, /readyz and /metrics from this port on."),
]
ServicePortOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=65535,
        help=f"Port of the HTTPS service where devices join; 0: none (default: "
        f"{DEFAULT_SERVICE_PORT}).",
    ),
]
ApiOption = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Serve the HTTP APIs of OpenAI and Ollama here; beyond this machine with TLS.",
    ),
]
ApiCertOption = Annotated[
    Path | None,
    path_option(help="Certificate of --api in PEM (default: of the fleet's own authority)."),
]
ApiCertKeyOption = Annotated[Path | None, path_option(help="Key of --api-cert in PEM.")]
ConsoleOption = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Serve the console and the operators' API here; beyond this machine with TLS.",
    ),
]
ConsoleCertOption = Annotated[
    Path | None,
    path_option(help="Certificate of --console in PEM (default: of the fleet's own authority)."),
]
ConsoleCertKeyOption = Annotated[Path | None, path_option(help="Key of --console-cert in PEM.")]
BundleOption = Annotated[
    Path | None,
    path_option(help="Folder of the bundle (default: the default model's, built if missing)."),
]

ModeOption = Annotated[
    str | None, typer.Option("--mode", help=f"One of {', '.join(Mode)}.", metavar="MODE")
]
ThresholdOption = Annotated[
    float | None, typer.Option(help="For all exits, 0 to 1; 1 switches the exits off.")
]
TokensOption = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens", min=1, max=MAX_NEW_TOKENS, help="Maximum length of the answer."
    ),
]
TemperatureOption = Annotated[
    float | None, typer.Option(min=0, max=MAX_TEMPERATURE, help="0 is greedy.")
]
TopPOption = Annotated[
    float | None, typer.Option(help="Nucleus: smallest set of tokens with this probability.")
]
TopKOption = Annotated[
    int | None,
    typer.Option(min=0, max=MAX_TOP_K, help="Draw from this number of likeliest tokens; 0: all."),
]
SeedOption = Annotated[
    int | None,
    typer.Option(min=0, max=MAX_SEED, help="Seed of the sampling (default: a new one each time)."),
]
MinPOption = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Smallest probability to draw, as a share of the best one's."),
]
SmoothOption = Annotated[
    bool,
    typer.Option(
        "--smooth-stream/--no-smooth-stream",
        help="Print tokens that arrive in bursts at a steady pace.",
    ),
]
RepetitionOption = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty", min=0.1, max=10, help="Above 1: fewer tokens of prompt and answer."
    ),
]
PresenceOption = Annotated[
    float | None,
    typer.Option(
        "--presence-penalty",
        min=-2,
        max=2,
        help="Above 0: fewer tokens of the answer so far.",
    ),
]
FrequencyOption = Annotated[
    float | None,
    typer.Option(
        "--frequency-penalty",
        min=-2,
        max=2,
        help="The same, for each time of the token.",
    ),
]
BiasOption = Annotated[
    list[str] | None,
    typer.Option(
        "--logit-bias", help="Add this to the logit of a token; repeatable.", metavar="ID=BIAS"
    ),
]
SchemaOption = Annotated[
    Path | None,
    path_option("--schema", help="File with a JSON schema; the answer is JSON that matches it."),
]
RegexOption = Annotated[
    str | None,
    typer.Option("--regex", help="Regular expression that the answer matches.", metavar="REGEX"),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option("--stop", help="End the answer before this text; up to 4 times.", metavar="TEXT"),
]


def print_json(value: object) -> None:
    """Print a value of msgspec's types as one line of JSON."""
    print(printable_json(msgspec.json.encode(value).decode()))


def parse_span(text: str) -> float:
    """Seconds of a span such as "90s", "10m", "1.5h" or "7d"; raises ConfigError."""
    span_s = _match_span(text)
    if span_s is None:
        raise ConfigError(f"span {text!r}: expected a number with its unit, such as 30s, 10m or 2h")
    return span_s


def _match_span(text: str) -> float | None:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    return float(match[1]) * UNITS_S[match[2]] if match else None


def format_span(span_s: float) -> str:
    """The shortest text that `parse_span` reads as `span_s`, such as "10m"."""
    units = [unit for unit, unit_s in UNITS_S.items() if span_s % unit_s == 0]
    unit = units[-1] if units else "s"
    return f"{span_s / UNITS_S[unit]:g}{unit}"


def parse_since(text: str | None) -> float | None:
    """Seconds since 1970 of a span before now, or of an ISO date; raises ConfigError.

    A date without a zone is in UTC, as every time that a command prints.
    """
    if text is None:
        return None
    span_s = _match_span(text)
    since = _parse_date(text) if span_s is None else time.time() - span_s
    if since is None or since < 0:
        raise ConfigError(
            f"since {text!r}: expected a span like 30m, 24h, 7d, or a date in UTC like 2026-01-31 "
            "or 2026-01-31T09:00, after 1970"
        )
    if since > time.time():
        raise ConfigError(f"since {text!r}: expected a time before now, got one in the future")
    return since


def _parse_date(text: str) -> float | None:
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        return None
    if date.year < EPOCH_YEAR:  # the number of such a date may be out of range
        return None
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def format_time(at: float | None, pattern: str = TO_THE_MINUTE) -> str:
    """A time in UTC with its zone, by default to the minute; `at` is in seconds since 1970."""
    if at is None:
        return "never"
    try:
        return datetime.fromtimestamp(at, UTC).strftime(pattern)
    except (ValueError, OverflowError, OSError):  # a device's clock may be anything
        return f"{at:g} s"


def parse_ttl(text: str, max_s: float, option: str = "ttl") -> float:
    """Seconds of a span from 1 s to `max_s`; raises ConfigError, which names the `option`."""
    span_s = _match_span(text)
    if span_s is None or not 1 <= span_s <= max_s:
        raise ConfigError(
            f"{option} {text!r}: expected a span like 15m, 24h or 7d, at most {format_span(max_s)}"
        )
    return span_s


def make_request(
    text: str | None,
    *,
    mode: str | None,
    threshold: float | None,
    temperature: float | None,
    top_p: float | None,
    stop: Sequence[str] | None = None,
    logit_bias: Sequence[str] | None = None,
    **fields: Any,
) -> PromptRequest:
    """A request from a command's options; without a text if that follows.

    `fields` are other fields of the request, which the options have checked.

    Raises:
        ConfigError: a value is outside its range, or the text is empty.
    """
    if temperature is not None and not 0.0 <= temperature <= MAX_TEMPERATURE:
        raise ConfigError(f"temperature {temperature}: expected 0 to {MAX_TEMPERATURE:g}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ConfigError(f"top-p {top_p}: expected a number above 0 and at most 1")
    if text is not None and is_blank(text):
        raise ConfigError("the prompt is empty; give some text")
    return PromptRequest(
        prompt=text,
        temperature=temperature,
        top_p=top_p,
        mode=parse_mode(mode) if mode else None,
        threshold=None if threshold is None else check_threshold(threshold),
        stop=_checked_stops(stop or ()),
        logit_bias=dict(map(_parse_bias, logit_bias)) if logit_bias else None,
        **fields,
    )


def read_response_format(schema: Path | None) -> ResponseFormat | None:
    """Return the form of an answer whose JSON schema is in a file. Raises ConfigError."""
    if schema is None:
        return None
    content: dict[str, Any] = read_json(schema, dict[str, Any], "write a JSON schema")
    return ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(schema=content))


def _parse_bias(text: str) -> tuple[str, float]:
    """Return the token id and the bias of a --logit-bias. Raises ConfigError."""
    token_id, _, bias = text.partition("=")
    try:
        return msgspec.convert((token_id, float(bias)), tuple[TokenKey, Bias])
    except ValueError:
        raise ConfigError(
            f"--logit-bias {text!r}: expected a token id and -100 to 100, such as 42=-5"
        ) from None


def _checked_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """Return the texts of --stop. Raises ConfigError."""
    try:
        return msgspec.convert(stops, StopTexts)
    except msgspec.ValidationError:
        raise ConfigError(
            "--stop: expected up to 4 texts of 1 to 256 characters each; shorten them"
        ) from None
