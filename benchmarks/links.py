"""Time and bytes of a token in each mode, with the whole model in the cloud, and with llama.cpp.

    fleet bench links --bundle DIR --model MODEL --prompts FILE [--links 5:100,20:31,100:10]
        [--max-new-tokens 32] [--limit 6] [--systems verified,cloud_only] [--json]

`--model` is what the bundle was exported from; for a GGUF file llama.cpp runs as well, on the
device and in the cloud. The systems are those of `fleet bench paper`: device and cloud have a core
each, over a broker with TLS and a link of that round trip in ms and bandwidth in Mbit/s. A system
without a cloud is measured once. An answer goes on after an end of the text, so that all answers
have the same length.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Final

import typer
from msgspec import Struct, to_builtins
from rich.table import Table

from benchmarks.drivers.answer import DriverAnswer
from benchmarks.edge import machine, parse_list
from benchmarks.paper.models import PaperModels
from benchmarks.paper.rig import LOOPBACK, Cost, Rig
from benchmarks.paper.rows import Link
from benchmarks.paper.systems import CALIBRATED, CLOUD_ONLY, SYSTEMS
from fleet.bundles.manifest import Bundle
from fleet.errors import ConfigError
from fleet.protocol.modes import CLOUD
from fleet.utils.cli_runtime import run_command
from fleet.utils.console import new_console
from fleet.utils.path_options import path_option
from fleet.utils.prompt_file import read_prompts
from onnx_export.checkpoint import cache_folder, is_gguf

LLAMA_SYSTEMS: Final = ("llama.cpp_device", "llama.cpp_cloud")
OWN_SYSTEMS: Final = ("standalone", CALIBRATED, "verified", CLOUD_ONLY)
WARM_UP_TOKENS: Final = 4

Progress = Callable[[str], None]
Measured = tuple[DriverAnswer, Cost]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class LinkRow(Struct, frozen=True, kw_only=True):
    """A system's answers over one link; `link` is None for a system without a cloud.

    `token_ms` and `first_token_ms` are medians over the answers. The others are means for a token:
    bytes of TCP payload, round trips, the share of tokens that came from the cloud, and ms of CPU.
    `as_cloud_only` is the share of tokens that equal those of the whole model in the cloud.
    """

    system: str
    link: Link | None
    token_ms: float
    first_token_ms: float
    bytes_up: float
    bytes_down: float
    round_trips: float
    from_cloud: float
    device_cpu_ms: float
    cloud_cpu_ms: float
    as_cloud_only: float | None


@app.command()
def run(
    bundle: Annotated[Path, path_option(help="Bundle's folder.")],
    model: Annotated[str, typer.Option(help="Model that it was exported from.")],
    prompts: Annotated[Path, path_option(help="File of prompts, .jsonl or text.")],
    links: Annotated[
        str, typer.Option(help="Round trip in ms and Mbit/s of each link.")
    ] = "5:100,20:31,100:10",
    systems: Annotated[str, typer.Option(help="Systems to measure; '' for all.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=2, max=512, help="Tokens of an answer.")] = 32,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Number of prompts.")] = 6,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare modes, the whole model in the cloud, and llama.cpp over several links."""
    console = new_console(stderr=True)

    def progress(line: str) -> None:
        console.print(line, style="dim", highlight=False, soft_wrap=True)

    known = (*OWN_SYSTEMS, *LLAMA_SYSTEMS) if is_gguf(model) else OWN_SYSTEMS
    chosen = parse_list(systems, known, "system") if systems else known
    shapes = parse_links(links)
    opened = Bundle.load(bundle)
    folder = cache_folder() / "bench" / f"whole-{opened.manifest.bundle_id[:16]}"
    models = PaperModels(opened, progress, model=model, folder=folder)
    rows = measure_links(
        models,
        read_prompts(prompts)[:limit],
        shapes,
        systems=chosen,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
    if as_json:
        print(json.dumps({"machine": machine(), "rows": to_builtins(rows)}))
    else:
        new_console().print(links_table(rows))


def parse_links(text: str) -> list[Link]:
    """Return links from text such as ``5:100,20:31``; raise ConfigError."""
    try:
        pairs = [each.split(":") for each in text.split(",")]
        return [Link(float(rtt_ms), float(mbit_s)) for rtt_ms, mbit_s in pairs]
    except ValueError:
        raise ConfigError(
            f"--links {text!r}: expected round trips in ms and Mbit/s, e.g. 5:100,20:31"
        ) from None


def measure_links(
    models: PaperModels,
    prompts: Sequence[str],
    links: Sequence[Link],
    *,
    systems: Sequence[str],
    max_new_tokens: int,
    progress: Progress,
) -> list[LinkRow]:
    """Answer each prompt with each system over each link, in turns, and return a row for each."""
    measured: dict[tuple[str, Link], list[Measured]] = {}
    with Rig(models, [SYSTEMS[name] for name in systems], progress) as rig:
        for name in systems:
            progress(f"warming up {name}")
            rig.answer(name, prompts[0], WARM_UP_TOKENS, LOOPBACK)
        for number, prompt in enumerate(prompts, 1):
            progress(f"prompt {number} of {len(prompts)}")
            for link, name in cases(links, systems):
                answer = rig.answer(name, prompt, max_new_tokens, link)
                measured.setdefault((name, link), []).append(answer)
    texts = {name: answers for (name, _), answers in measured.items()}
    reference = [answer.token_ids for answer, _ in texts.get(CLOUD_ONLY, [])]
    return [summarize(name, link, answers, reference) for (name, link), answers in measured.items()]


def cases(links: Sequence[Link], systems: Sequence[str]) -> Iterator[tuple[Link, str]]:
    """Yield each link with each system; a system without a cloud has the first link alone."""
    for link, name in product(links, systems):
        if SYSTEMS[name].cloud or link == links[0]:
            yield link, name


def summarize(
    name: str, link: Link, measured: Sequence[Measured], reference: Sequence[Sequence[int]]
) -> LinkRow:
    """Return the row of a system's answers; `reference` are the whole model's tokens."""
    answers = [answer for answer, _ in measured]
    costs = [cost for _, cost in measured]
    num_tokens = sum(len(answer.token_ids) for answer in answers)

    def per_token(values: Iterator[float]) -> float:
        return sum(values) / num_tokens

    return LinkRow(
        system=name,
        link=link if SYSTEMS[name].cloud else None,
        token_ms=median(answer.total_ms / len(answer.token_ids) for answer in answers),
        first_token_ms=median(answer.ttft_ms for answer in answers),
        bytes_up=per_token(cost.traffic.bytes_up for cost in costs),
        bytes_down=per_token(cost.traffic.bytes_down for cost in costs),
        round_trips=per_token(answer.round_trips for answer in answers),
        from_cloud=per_token(answer.tokens_from.get(CLOUD, 0) for answer in answers),
        device_cpu_ms=1e3 * per_token(cost.edge_s for cost in costs),
        cloud_cpu_ms=1e3 * per_token(cost.cloud_s for cost in costs),
        as_cloud_only=equal_share(answers, reference) if reference else None,
    )


def equal_share(answers: Sequence[DriverAnswer], reference: Sequence[Sequence[int]]) -> float:
    """Return the mean share of an answer's tokens that equal the reference's at their place."""
    return mean(
        sum(map(int.__eq__, answer.token_ids, expected)) / len(expected)
        for answer, expected in zip(answers, reference, strict=True)
    )


def links_table(rows: Sequence[LinkRow]) -> Table:
    """Return a table with a line for each row; JSON has more figures."""
    titles = ("system", "link", "ms", "first ms", "B up", "B down", "cloud", "as cloud_only")
    table = Table(title="a token: ms and Mbit/s of the link, time, bytes, shares")
    for title in titles:
        table.add_column(title, justify="left" if title == "system" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    return table


def cells(row: LinkRow) -> list[str]:
    """Return the cells of a row."""
    return [
        row.system,
        f"{row.link.rtt_ms:g}, {row.link.mbit_s:g}" if row.link else "none",
        f"{row.token_ms:.1f}",
        f"{row.first_token_ms:.0f}",
        f"{row.bytes_up:.0f}",
        f"{row.bytes_down:.0f}",
        f"{row.from_cloud:.2f}",
        "" if row.as_cloud_only is None else f"{row.as_cloud_only:.2f}",
    ]


if __name__ == "__main__":
    run_command("benchmarks.links", app)
