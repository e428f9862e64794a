"""Times that `fleet plan` predicts for other splits, next to measured ones.

    fleet bench plan [--shape default|0.5b|1.1b|3b|7b] [--splits 8,15,24] [--rounds 5] [--json]
    fleet bench plan --bundle DIR [--fitted LAYER] [--rtt 20,100] [--bandwidth 31] [--prompts FILE]
        [--answers 5] [--tokens 32] [--json]

The constants are those of the middle split, as `edge-agent measure` and the worker's `measure` give
them. They predict the steps of the device and of the worker at the other splits, the whole model on
either side, and a token in `verified` of which no draft is accepted: a step of the device, then one
of the worker. All of these are measured, too; none but the middle split's steps is in the
constants.

Times are those of one thread's CPU, and all engines take turns, round by round, so that other work
on the machine changes all of them. A link is not part of it.

With a bundle that has several upload layers, whole answers are measured instead, at each of its
splits and over links: see `benchmarks.split_answers`. Their times are those of the clock, so the
machine should do nothing else.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Final

import typer
from msgspec import Struct, to_builtins
from rich.console import Console
from rich.table import Table

from benchmarks.edge import machine
from benchmarks.graphs import EdgeGraphs
from benchmarks.paper.rows import Link
from benchmarks.partitions import CloudPartitions
from benchmarks.random_model import SHAPES, ModelShape, random_model
from benchmarks.split_answers import compare_answers
from cloud_broker_worker.worker.config import Weights
from cloud_broker_worker.worker.speed import RequestTimer, WorkerMeter
from cloud_broker_worker.worker.upper_layers import UpperLayers
from edge_agent.engine.speed import TOKEN, DeviceMeter, StepTimer
from fleet.bundles.manifest import Bundle, read_manifest
from fleet.errors import ConfigError
from fleet.graphs.partition import Partition
from fleet.planning.cost_model import PlanRequest, check_request
from fleet.planning.machine_speeds import MachineSpeeds, warn_about_load
from fleet.utils.cli_runtime import run_command
from fleet.utils.console import new_console
from fleet.utils.path_options import path_option
from fleet.utils.prompt_file import read_prompts
from onnx_export.__main__ import parse_numbers
from onnx_export.architecture import check_exits
from onnx_export.config import DEFAULT_MODEL, ExportConfig
from onnx_export.streamed_model import StreamedModel

DEFAULT: Final = "default"
DEFAULT_SPLITS: Final = (8, 15, 24)
NUM_SPLITS: Final = 3
STEPS: Final = 20
PROMPTS: Final = Path(__file__).parent / "data/prompts.txt"

Progress = Callable[[str], None]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class PlanRow(Struct, frozen=True, kw_only=True):
    """A time of a token in ms. `error` is that of the prediction, as a share of the measured time.

    `layers` are those of the device.
    """

    name: str
    layers: int
    measured_ms: float
    predicted_ms: float
    error: float
    is_held_back: bool


@dataclass(frozen=True, kw_only=True)
class SplitEngines:
    """Both halves of one split; a side that has no layer is None."""

    layer: int
    partition: Partition | None
    upper: UpperLayers | None


class PairMeter:
    """Times of a token that runs on the device, and then on the worker."""

    def __init__(self, partition: Partition, upper: UpperLayers) -> None:
        self._partition = partition
        self._upper = upper
        self._tokens_s: list[float] = []

    def run_round(self, steps: int) -> None:
        """Run some tokens of a new sequence; the first is not counted."""
        device = StepTimer(self._partition, steps + 1, time.thread_time)
        worker = RequestTimer(self._upper, steps + 1, time.thread_time)
        for i in range(steps + 1):
            token_s = device.run(TOKEN) + device.head() + worker.run(1, has_logits=True)
            self._tokens_s += [token_s] if i else []

    @property
    def step_ms(self) -> float:
        """The time of a token."""
        return 1e3 * median(self._tokens_s)


class SplitMeters:
    """The meters of one split, which run in turns."""

    def __init__(self, engines: SplitEngines) -> None:
        partition = engines.partition
        upper = engines.upper
        self.layer = engines.layer
        self.device = DeviceMeter(partition, time.thread_time) if partition else None
        self.worker = WorkerMeter(upper, time.thread_time) if upper else None
        self.pair = PairMeter(partition, upper) if partition and upper else None

    def run_round(self) -> None:
        """Run each of them."""
        for meter in (self.device, self.worker, self.pair):
            if meter is not None:
                meter.run_round(STEPS)


def open_splits(
    graphs: EdgeGraphs,
    model: str,
    folder: Path,
    stream: StreamedModel | None,
    splits: Sequence[int],
    weights: Weights,
    progress: Progress,
) -> Iterator[SplitEngines]:
    """Export and load both halves of each split, the whole model on either side included."""
    preset = ExportConfig(out=folder, exits=(1,)).quantization
    manifest = read_manifest(graphs.bundle(splits[0], preset))
    partitions = CloudPartitions(manifest, progress, model, folder, stream)
    num_layers = manifest.model.num_layers
    for layer in (0, *splits, num_layers):
        progress(f"loading a split after {layer} of {num_layers} layers")
        edge = Bundle.load(graphs.bundle(layer, preset), ("edge",)) if layer else None
        cloud = partitions.bundle(layer) if layer < num_layers else None
        yield SplitEngines(
            layer=layer,
            partition=Partition(edge, num_threads=1) if edge else None,
            upper=UpperLayers(cloud, 1, weights) if cloud else None,
        )


def measure_splits(
    engines: Sequence[SplitEngines], rounds: int, weights: Weights, progress: Progress
) -> tuple[MachineSpeeds, MachineSpeeds, list[PlanRow]]:
    """Return the constants of the middle split on both sides, and all rows."""
    meters = [SplitMeters(one) for one in engines]
    for number in range(1, rounds + 1):
        progress(f"round {number} of {rounds}")
        for meter in meters:
            meter.run_round()
    middle = meters[len(meters) // 2]
    if middle.device is None or middle.worker is None:
        raise ConfigError("the middle split has no layers on one side; choose other --splits")
    device = middle.device.speeds(1)
    worker = middle.worker.speeds(1, weights)
    return device, worker, list(plan_rows(meters, middle, device, worker))


def plan_rows(
    meters: Sequence[SplitMeters],
    middle: SplitMeters,
    device: MachineSpeeds,
    worker: MachineSpeeds,
) -> Iterator[PlanRow]:
    """Yield the measured and predicted times of each split."""
    num_layers = meters[-1].layer
    for one in meters:
        edge_ms = device.step_ms(one.layer)
        cloud_ms = worker.step_ms(num_layers - one.layer)
        is_held_back = one is not middle
        if one.device is not None:
            name = "device" if one.worker else "on_device"
            yield plan_row(name, one.layer, one.device.step_ms, edge_ms, is_held_back)
        if one.worker is not None:
            name = "worker" if one.device else "cloud_only"
            yield plan_row(name, one.layer, one.worker.step_ms, cloud_ms, is_held_back)
        if one.pair is not None:
            yield plan_row("verified", one.layer, one.pair.step_ms, edge_ms + cloud_ms, True)


def plan_row(
    name: str, layers: int, measured_ms: float, predicted_ms: float, is_held_back: bool
) -> PlanRow:
    """Return a row with its error."""
    return PlanRow(
        name=name,
        layers=layers,
        measured_ms=measured_ms,
        predicted_ms=predicted_ms,
        error=predicted_ms / measured_ms - 1,
        is_held_back=is_held_back,
    )


def random_stream(shape: ModelShape, name: str, folder: Path, progress: Progress) -> StreamedModel:
    """Return a model with random weights, made when they are read."""
    config = ExportConfig(out=folder, exits=(1,), model=name)
    model, _ = random_model(shape, 0)(config, progress)
    return model


def measure_shape(
    shape: str, splits: Sequence[int], rounds: int, progress: Progress
) -> dict[str, Any]:
    """Return the constants and the rows of a model."""
    is_default = shape == DEFAULT
    name = DEFAULT_MODEL if is_default else f"random-{shape}"
    weights: Weights = "float32" if is_default else "bfloat16"
    with TemporaryDirectory(prefix="fleet-bench-") as temporary:
        folder = Path(temporary)
        stream = None if is_default else random_stream(SHAPES[shape], name, folder, progress)
        graphs = EdgeGraphs(progress, name, folder, stream)
        opened = open_splits(graphs, name, folder, stream, splits, weights, progress)
        device, worker, rows = measure_splits(list(opened), rounds, weights, progress)
    errors = sorted(abs(row.error) for row in rows if row.is_held_back)
    return {
        "model": name,
        "splits": list(splits),
        "device": to_builtins(device),
        "worker": to_builtins(worker),
        "rows": to_builtins(rows),
        "median_error": median(errors),
        "highest_error": errors[-1],
        "machine": machine(),
    }


def print_result(console: Console, result: dict[str, Any]) -> None:
    """Print the rows as a table, and the errors of those that are held back."""
    table = Table(title=f"a token of {result['model']}, ms of one core", title_justify="left")
    for header in ("", "layers on the device", "measured", "predicted", "error", "held back"):
        table.add_column(header, justify="right" if header else "left")
    for row in result["rows"]:
        table.add_row(
            row["name"],
            str(row["layers"]),
            f"{row['measured_ms']:.1f}",
            f"{row['predicted_ms']:.1f}",
            f"{row['error']:+.1%}",
            "yes" if row["is_held_back"] else "no",
        )
    console.print(table)
    errors = {"median": result["median_error"], "highest": result["highest_error"]}
    print_errors(console, "held back", errors)


def print_answers(console: Console, result: dict[str, Any]) -> None:
    """Print the rows of whole answers as a table, and the errors of those that are held back."""
    title = (
        f"an answer of {result['tokens']} tokens of {result['model']}, s; constants of split "
        f"{result['fitted']}, {result['round_trip_ms']:.0f} ms a round trip beyond the link"
    )
    table = Table(title=title, title_justify="left")
    for header in ("", "layers", "rtt, ms", "measured", "predicted", "error"):
        table.add_column(header, justify="right" if header else "left")
    for header in ("trips", "predicted", "error at these trips"):
        table.add_column(header, justify="right")
    for row in result["rows"]:
        has_link = row["link"]["mbit_s"]
        table.add_row(
            row["mode"],
            str(row["layers"]),
            f"{row['link']['rtt_ms']:g}" if has_link else "-",
            f"{row['measured_s']:.2f}",
            f"{row['predicted_s']:.2f}",
            f"{row['error']:+.1%}",
            f"{row['round_trips']:.1f}" if has_link else "-",
            f"{row['predicted_round_trips']:.1f}" if has_link else "-",
            f"{row['error_at_measured_trips']:+.1%}",
        )
    console.print(table)
    for name, errors in result["errors"].items():
        print_errors(console, f"{name.replace('_', ' ')}, held back", errors)


def print_errors(console: Console, name: str, errors: dict[str, float]) -> None:
    """Print the errors of the rows that are held back."""
    console.print(
        f"{name}: median error {errors['median']:.1%}, largest {errors['highest']:.1%}",
        highlight=False,
    )


@app.command()
def run(
    shape: Annotated[
        str, typer.Option(help=f"The model: {DEFAULT}, or random weights of {', '.join(SHAPES)}.")
    ] = DEFAULT,
    splits: Annotated[
        str | None,
        typer.Option(help="Three layers (default: 8,15,24, or a quarter, half, three quarters)."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which all take turns.")] = 5,
    bundle: Annotated[
        Path | None, path_option(help="Measure whole answers at the splits of this bundle.")
    ] = None,
    fitted: Annotated[
        int | None, typer.Option(min=1, help="Split that gives the constants (default: middle).")
    ] = None,
    rtt: Annotated[str, typer.Option(help="Round trips of the links, in ms.")] = "20,100",
    bandwidth: Annotated[float, typer.Option(min=0.01, help="Their bandwidth, in Mbit/s.")] = 31.0,
    prompts: Annotated[Path, path_option(help="File of prompts.", show_default=False)] = PROMPTS,
    answers: Annotated[int, typer.Option(min=1, help="Answers of a row.")] = 5,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare the planner's predictions for other splits with measured times."""
    console = new_console(stderr=True)

    def progress(line: str) -> None:
        console.print(line, style="dim", highlight=False)

    if bundle is None:
        result = measure_shape(shape, chosen_splits(splits, shape), rounds, progress)
    else:
        links = chosen_links(rtt, bandwidth)
        texts = read_prompts(prompts)[:answers]
        warn_about_load()
        result = compare_answers(Bundle.load(bundle), fitted, links, texts, tokens, progress)
    if as_json:
        print(json.dumps(result))
    else:
        (print_result if bundle is None else print_answers)(new_console(), result)


def chosen_links(rtts: str, mbit_s: float) -> list[Link]:
    """Return the links; raise ConfigError for a round trip outside its range."""
    links = [Link(rtt_ms, mbit_s) for rtt_ms in parse_numbers(rtts, float, "--rtt", "20,100")]
    for link in links:
        check_request(PlanRequest(rtt_ms=link.rtt_ms, mbit_s=link.mbit_s))
    return links


def chosen_splits(text: str | None, shape: str) -> tuple[int, ...]:
    """Return the three splits.

    Raises:
        ConfigError: the shape is unknown, or there are not three splits below the last layer.
    """
    if shape != DEFAULT and shape not in SHAPES:
        names = ", ".join((DEFAULT, *SHAPES))
        raise ConfigError(f"unknown shape {shape!r}: expected one of {names}")
    num_layers = SHAPES[shape].num_layers if shape in SHAPES else EdgeGraphs(print).num_layers
    if text is None:
        quarters = tuple(num_layers * i // 4 for i in (1, 2, 3))
        return DEFAULT_SPLITS if shape == DEFAULT else quarters
    layers = tuple(parse_numbers(text, int, "--splits", "8,15,24"))
    check_exits(layers, num_layers)
    if len(layers) != NUM_SPLITS or layers[-1] >= num_layers:
        raise ConfigError(f"--splits {text}: expected three layers below {num_layers}")
    return layers


if __name__ == "__main__":
    run_command("benchmarks.plan", app)
