"""Numbers of workers, broker nodes and registry writes of a fleet, from one machine's measurements.

    python -m benchmarks.scaling                                # the tables of docs/scaling.md
    python -m benchmarks.scaling --answers-per-hour 20          # of another load
    fleet demo --json > demo.json
    fleet bench worker --only throughput --json > worker.json
    python -m benchmarks.scaling --demo demo.json --worker worker.json --save  # new measurements

Measurements are kept in benchmarks/data/scaling.json; all other figures are computed here. The
brokers' figures are their makers': see `BROKER_SOURCES`.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer

from benchmarks.edge import machine
from edge_agent.session.session_machine import MAX_HELD_POSITIONS
from fleet.protocol.access import Role
from fleet.protocol.report import GenerationReport
from fleet.registry.store import Registry
from fleet.server.collector import MAX_BATCH
from fleet.utils.path_options import path_option

DATA: Final = Path(__file__).parent / "data/scaling.json"
FLEETS: Final = (1_000, 10_000, 100_000, 1_000_000)
MESSAGES_PER_ROUND_TRIP: Final = 2  # verify request with its context, response
# Prompt, open, opened, first context and its receipt, close, last reply, report and its receipt.
MESSAGES_PER_ANSWER: Final = 9
NUM_REPORTS: Final = 5_000

CONNECTIONS_PER_NODE: Final = 10_000_000 / 5
MESSAGES_PER_NODE: Final = 1_000_000 / 23
BROKER_SOURCES: Final = {
    "10 million connections on 5 nodes of 32 cores and 64 GB, EMQX 4.3": (
        "https://www.emqx.com/en/resources/emqx-v-4-3-0-ten-million-connections-performance-test-report"
    ),
    "1 million messages a second, one publisher to one subscriber, on 23 nodes, EMQX 5.0": (
        "https://www.emqx.com/en/blog/reaching-100m-mqtt-connections-with-emqx-5-0"
    ),
}


class MeanAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The mean answer of a device, in `fleet demo`.

    Bytes are those of the session, without replies to apps.
    """

    prompt_tokens: float
    tokens: float
    round_trips: float
    bytes_up: float
    bytes_down: float
    seconds: float

    @property
    def positions(self) -> float:
        """The maximum number of positions that run through the worker's layers."""
        return self.prompt_tokens + self.tokens

    @property
    def messages(self) -> float:
        """The messages that the broker receives, replies included: one a token."""
        alone = (self.tokens - self.round_trips) / (
            MAX_HELD_POSITIONS + 1
        )  # context that no request uses, at most
        return (
            MESSAGES_PER_ROUND_TRIP * self.round_trips + alone + self.tokens + MESSAGES_PER_ANSWER
        )


class Capacity(msgspec.Struct, frozen=True):
    """One worker with `sessions` sessions that request every token, in `fleet bench worker`."""

    sessions: int
    threads: int
    positions_per_s: float
    bytes_per_position: int


class Inputs(msgspec.Struct, frozen=True):
    """All measurements. Reports a second are those that one collector stores in SQLite."""

    answer: MeanAnswer
    worker: Capacity
    reports_per_s: float
    machine: dict[str, Any]


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """The need of a fleet with this number of devices in its busiest hour."""

    devices: int
    answers_per_s: float
    sessions: float
    questions_per_s: float
    megabytes_per_s: float
    session_gigabytes: float
    workers: int
    messages_per_s: float
    broker_nodes: int
    registry_share: float


def need(devices: int, inputs: Inputs, answers_per_hour: float, utilisation: float) -> Need:
    """Return the need for `answers_per_hour` of a device in the busiest hour.

    Workers and brokers are to be busy by `utilisation`.
    """
    answer = inputs.answer
    worker = inputs.worker
    rate = devices * answers_per_hour / 3600
    sessions = rate * answer.seconds
    messages = rate * answer.messages
    nodes = max(devices / CONNECTIONS_PER_NODE, messages / MESSAGES_PER_NODE)
    return Need(
        devices=devices,
        answers_per_s=rate,
        sessions=sessions,
        questions_per_s=rate * answer.round_trips,
        megabytes_per_s=rate * (answer.bytes_up + answer.bytes_down) / 1e6,
        session_gigabytes=sessions * answer.positions * worker.bytes_per_position / 1e9,
        workers=math.ceil(rate * answer.positions / (utilisation * worker.positions_per_s)),
        messages_per_s=messages,
        broker_nodes=math.ceil(nodes / utilisation),
        registry_share=rate / inputs.reports_per_s,
    )


# Measurements.


def answer_of(demo: dict[str, Any]) -> MeanAnswer:
    """Read the output of ``fleet demo --json``."""
    results = demo["results"]
    (stats,) = demo["stats"]

    def mean(field: str) -> float:
        return float(sum(result[field] for result in results)) / len(results)

    seconds = [r["ttft_ms"] / 1e3 + r["tpot_ms"] / 1e3 * len(r["token_ids"]) for r in results]
    return MeanAnswer(
        prompt_tokens=stats["prompt_tokens"] / len(results),
        tokens=stats["tokens"] / len(results),
        round_trips=mean("round_trips"),
        bytes_up=mean("bytes_up"),
        bytes_down=mean("bytes_down"),
        seconds=sum(seconds) / len(results),
    )


def capacity_of(bench: dict[str, Any]) -> Capacity:
    """Read the output of ``fleet bench worker --only throughput --json``.

    Return its row with the most sessions.
    """
    sessions = max(bench["sessions"], key=int)
    rate = bench["sessions"][sessions]["tokens_per_s"]
    return Capacity(
        int(sessions), bench["threads"], rate, sum(bench["bytes_per_position"].values())
    )


def reports_per_s() -> float:
    """Measure the reports that a registry in SQLite stores in a second from the collector."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Registry.open(Path(folder) / "registry.sqlite") as registry,
    ):
        registry.identities.add_identity("edge-1", Role.DEVICE, fingerprint="0" * 64, not_after=2e9)
        start = time.perf_counter()
        for first in range(0, NUM_REPORTS, MAX_BATCH):
            reports = [report(number) for number in range(first, first + MAX_BATCH)]
            registry.stats.record_reports({("edge-1", each.generation): each for each in reports})
        return NUM_REPORTS / (time.perf_counter() - start)


def report(number: int) -> GenerationReport:
    return GenerationReport(
        generation=f"g{number}",
        app="app",
        request=f"r{number}",
        session=f"s{number}",
        worker="worker-1",
        bundle_id="b" * 32,
        mode="collaborative",
        started_at=time.time(),
        prompt_tokens=42,
        tokens=60,
        sources={"exit:24": 16, "cloud": 44},
        assists=44,
        bytes_up=100_000,
        bytes_down=5_000,
        ttft_ms=500.0,
        tpot_ms=100.0,
        finish_reason="stop",
    )


# Output.


def tables(inputs: Inputs, answers_per_hour: float, utilisation: float) -> str:
    """Return the measurements and the computed figures in Markdown."""
    answer = inputs.answer
    worker = inputs.worker
    measured = {
        "prompt, tokens": f"{answer.prompt_tokens:.0f}",
        "answer, tokens": f"{answer.tokens:.0f}",
        "round trips a token": f"{answer.round_trips / answer.tokens:.2f}",
        "bytes up a token": f"{answer.bytes_up / answer.tokens:,.0f}",
        "bytes down a token": f"{answer.bytes_down / answer.tokens:,.0f}",
        "messages a token, replies included, at most": f"{answer.messages / answer.tokens:.1f}",
        "seconds an answer": f"{answer.seconds:.1f}",
        f"positions a second of a worker ({worker.sessions} sessions, {worker.threads} threads)": (
            f"{worker.positions_per_s:,.0f}"
        ),
        "bytes a position in a worker's memory": f"{worker.bytes_per_position:,}",
        "reports a second that one collector stores in SQLite": f"{inputs.reports_per_s:,.0f}",
    }
    needs = [need(devices, inputs, answers_per_hour, utilisation) for devices in FLEETS]
    rows = {
        "answers a second": [f"{n.answers_per_s:,.1f}" for n in needs],
        "sessions at once": [f"{n.sessions:,.0f}" for n in needs],
        "verify requests a second": [f"{n.questions_per_s:,.0f}" for n in needs],
        "MB a second of sessions": [f"{n.megabytes_per_s:,.1f}" for n in needs],
        "GB of sessions, over all workers": [f"{n.session_gigabytes:,.1f}" for n in needs],
        "workers of this size": [f"{n.workers:,}" for n in needs],
        "messages a second into the broker": [f"{n.messages_per_s:,.0f}" for n in needs],
        "broker nodes": [f"{n.broker_nodes:,}" for n in needs],
        "share of what one collector stores": [f"{n.registry_share:.1%}" for n in needs],
    }
    return "\n".join(
        [
            *markdown(["measured", ""], [[name, value] for name, value in measured.items()]),
            "",
            *markdown(
                ["devices", *(f"{n.devices:,}" for n in needs)],
                [[name, *row] for name, row in rows.items()],
            ),
        ]
    )


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def run(
    answers_per_hour: Annotated[
        float, typer.Option(min=0, help="Answers of one device in the busiest hour.")
    ] = 4.0,
    utilisation: Annotated[
        float, typer.Option(min=0.01, max=1, help="Maximum utilisation of workers and brokers.")
    ] = 0.6,
    demo: Annotated[Path | None, path_option(help="Output of 'fleet demo --json'.")] = None,
    worker: Annotated[
        Path | None, path_option(help="Output of 'fleet bench worker --json'.")
    ] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Measure the registry, too, and save all measurements.")
    ] = False,
) -> None:
    """Print the needs of a fleet."""
    inputs = msgspec.json.decode(DATA.read_bytes(), type=Inputs)
    if demo:
        inputs = msgspec.structs.replace(inputs, answer=answer_of(json.loads(demo.read_text())))
    if worker:
        inputs = msgspec.structs.replace(inputs, worker=capacity_of(json.loads(worker.read_text())))
    if save:
        inputs = msgspec.structs.replace(inputs, reports_per_s=reports_per_s(), machine=machine())
        DATA.write_bytes(msgspec.json.format(msgspec.json.encode(inputs), indent=2) + b"\n")
    print(tables(inputs, answers_per_hour, utilisation))


if __name__ == "__main__":
    typer.run(run)
