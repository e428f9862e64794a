"""The worker's engine: positions a second by sessions, devices that one core serves, round trips a
token.

    fleet bench worker [--only throughput,devices,round-trips,weights] [--weights float32]
        [--plot FILE] [--json]

Devices replay answers that were recorded as they are deployed, with real hidden states; the engine
really runs, in virtual time (benchmarks/replay.py). A collaborating device works its recorded step
times on a core of its own, asks about the tokens that no exit emits and drafts on during a link's
round trip (edge_agent/generation/speculative.py). A cloud-only stream is the full model in the same
engine, with no link between its tokens.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Final, get_args

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.breakdown import read_bandwidth
from benchmarks.edge import machine, parse_list
from benchmarks.fidelity import PROMPTS
from benchmarks.partitions import CloudPartitions
from benchmarks.recordings import AnswerRecording, record_answers, recorded_offload_rate
from benchmarks.replay import ReplayDevice, ReplayWorker
from cloud_broker_worker.worker.config import Weights, WorkerConfig
from cloud_broker_worker.worker.upper_layers import Chunk, UpperLayers
from fleet.bundles.manifest import Bundle
from fleet.cli.demo import DEVICE, running_fleet
from fleet.cli.responses import stream_response
from fleet.protocol.hidden_states import Float16
from fleet.protocol.modes import Mode, exit_source
from fleet.protocol.prompt import PromptRequest
from fleet.transport.prompt_client import PromptClient
from fleet.utils.cli_runtime import run_command
from fleet.utils.console import new_console
from fleet.utils.optional_imports import needs
from fleet.utils.path_options import path_option
from fleet.utils.prompt_file import read_prompts
from onnx_export.default_bundle import default_bundle

PARTS: Final = ("throughput", "devices", "round-trips", "weights")
SESSIONS: Final = (1, 4, 16, 64)
HALF_LAYER: Final = 15
NUM_RECORDINGS: Final = 16
ROUNDS: Final = 3
THRESHOLDS: Final = (0.6, 0.7, 0.8, 0.95, 1.0)
WARM_UP_S: Final = 4.0
MAX_DEVICES: Final = 512
POOL_BYTES: Final = 1 << 34
NUM_STEPS: Final = 25
NUM_WARM_UP: Final = 5
PROMPT_ROWS: Final = 64

Progress = Callable[[str], None]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class SessionSteps:
    """Steps of some sessions, each of which asks for every token; their inputs are random."""

    def __init__(self, layers: UpperLayers, num_sessions: int) -> None:
        pool = layers.new_pool(POOL_BYTES)
        length = PROMPT_ROWS + NUM_STEPS
        self._layers = layers
        self._random = np.random.default_rng(0)
        self.leases = [pool.lease(length) for _ in range(num_sessions)]
        layers(self._chunks(PROMPT_ROWS))

    def _chunks(self, count: int) -> list[Chunk]:
        """Return the next `count` positions of each session."""
        shape = (count, self._layers.manifest.model.hidden_size)
        chunks = []
        for lease in self.leases:
            rows = self._random.standard_normal(shape).astype(np.float16)
            stop = lease.length + count
            chunks.append(Chunk(lease, rows, lease.length, stop, [stop - 1]))
        return chunks

    def time_step(self) -> float:
        """Run one position of each session; return the time in s."""
        chunks = self._chunks(1)
        begin = time.perf_counter()
        self._layers(chunks)
        return time.perf_counter() - begin


def step_ms_by_weights(
    bundle: Bundle, num_threads: int, progress: Progress
) -> dict[str, dict[str, float]]:
    """Return the median time of a step in ms, by the kind of weights and the number of sessions.

    The kinds take turns.
    """
    kinds: Sequence[Weights] = get_args(Weights)
    layers = {kind: UpperLayers(bundle, num_threads, kind) for kind in kinds}
    result: dict[str, dict[str, float]] = {kind: {} for kind in kinds}
    for number in SESSIONS:
        progress(f"steps of {number} sessions with each kind of weights")
        steps = {kind: SessionSteps(layers[kind], number) for kind in kinds}
        rounds = [{kind: steps[kind].time_step() for kind in kinds} for _ in range(NUM_STEPS)]
        for kind in kinds:
            times = [each[kind] for each in rounds[NUM_WARM_UP:]]
            result[kind][str(number)] = 1e3 * median(times)
    return result


class WorkerBench:
    """One run of the benchmark, with the given weights of the worker."""

    def __init__(
        self, bundle: Bundle, weights: Weights, num_tokens: int, progress: Progress
    ) -> None:
        self.bundle = bundle
        self._weights = weights
        self._progress = progress
        self._partitions = CloudPartitions(bundle.manifest, progress)
        upper = UpperLayers(bundle, 1)
        prompts = read_prompts(PROMPTS)[:NUM_RECORDINGS]
        self.recordings = record_answers(bundle, upper, prompts, num_tokens, progress)
        self._embedding = np.load(bundle.path("edge/embedding.npy"), mmap_mode="r")

    def _layers(self, layer: int | None, num_threads: int) -> UpperLayers:
        bundle = self.bundle if layer is None else self._partitions.bundle(layer)
        return UpperLayers(bundle, num_threads, self._weights)

    def _config(self, num_threads: int) -> WorkerConfig:
        return WorkerConfig(num_threads=num_threads, kv_budget_bytes=POOL_BYTES, idle_after_s=1e9)

    def uploads(self, recording: AnswerRecording) -> Float16:
        """Return the uploads of a device of the shipped bundle."""
        return recording.hidden_states

    def embeddings(self, recording: AnswerRecording) -> Float16:
        """Return the inputs of a worker with every layer."""
        rows: Float16 = self._embedding[recording.token_ids].astype(np.float16)
        return rows

    def agreement(self) -> float:
        """The share of the tokens of float32 that the worker's weights choose, too."""
        layers = self._layers(None, 1)
        equal = 0
        pool = layers.new_pool(POOL_BYTES)
        for recording in self.recordings:
            length = len(recording.token_ids)
            stop = len(recording.token_ids) - 1
            lease = pool.lease(length)
            asked = range(recording.num_prompt - 1, stop)
            logits = layers([Chunk(lease, recording.hidden_states[:-1], 0, stop, asked)])
            equal += int(
                (logits.argmax(-1).numpy() == recording.token_ids[recording.num_prompt :]).sum()
            )
            pool.free_lease(lease)
        return equal / sum(recording.num_answer - 1 for recording in self.recordings)

    # Throughput.

    def throughput(self, num_threads: int) -> dict[str, dict[str, float]]:
        """Sessions that all ask for every token: medians over the rounds, a row for each number of
        sessions.
        """
        layers = self._layers(None, num_threads)
        rounds: dict[int, list[dict[str, float]]] = {n: [] for n in SESSIONS}
        for i in range(ROUNDS + 1):
            for n in SESSIONS:
                self._progress(f"{n} sessions that ask for every token, round {i} of {ROUNDS}")
                measured = self._ask_always(layers, n, num_threads)
                if i:  # the first round warms up
                    rounds[n].append(measured)
        rows = {
            str(n): {key: median(row[key] for row in rows) for key in rows[0]}
            for n, rows in rounds.items()
        }
        for n in SESSIONS:
            speedups = (
                a["tokens_per_s"] / b["tokens_per_s"]
                for a, b in zip(rounds[n], rounds[1], strict=True)
            )
            rows[str(n)]["speedup"] = median(speedups)
        return rows

    def _ask_always(
        self, layers: UpperLayers, num_sessions: int, num_threads: int
    ) -> dict[str, float]:
        thresholds = [1.0] * len(self.bundle.manifest.exits)
        devices = [
            ReplayDevice(
                name=f"device-{i}",
                bundle_id=layers.manifest.bundle_id,
                rows=self.uploads,
                thresholds=thresholds,
                works=False,
            )
            for i in range(num_sessions)
        ]
        worker = ReplayWorker(layers, self._config(num_threads), time.perf_counter)
        worker.serve(
            (device, device.run([r]))
            for device, r in zip(devices, cycle(self.recordings), strict=False)
        )
        worker.engine.check_integrity()
        start = max(device.answers[0][1] for device in devices)  # all have finished their prompts
        stop = min(device.tokens[-1][0] for device in devices)
        waits = [wait for device in devices for at, wait in device.tokens if start < at <= stop]
        p50 = quantiles(waits, n=100)[49]
        p99 = quantiles(waits, n=100)[98]
        return {
            "tokens_per_s": len(waits) / (stop - start),
            "assist_p50_ms": 1e3 * p50,
            "assist_p99_ms": 1e3 * p99,
        }

    def one_position(self, num_threads: int) -> dict[str, Any]:
        """Milliseconds for one position of one session, by the first layer of the cloud's side,
        beside the weights that such a step reads and how fast this machine reads."""
        taken = {}
        weights = {}
        for layer in dict.fromkeys((self.bundle.manifest.upload_layer, HALF_LAYER)):
            layers = self._layers(layer, num_threads)
            rounds = [
                self._ask_always(layers, 1, num_threads)["assist_p50_ms"] for _ in range(ROUNDS)
            ]
            taken[str(layer)] = median(rounds)
            weights[str(layer)] = layers.weight_bytes / 1e6
        return {
            "one_position_ms": taken,
            "weights_mb": weights,
            "read_gb_per_s": read_bandwidth(num_threads) / 1e9,
        }

    # Devices per worker.

    def devices(self, p95_ms: float, link_s: float, seconds: float) -> dict[str, Any]:
        """Measure how many devices of each kind one core serves with 95% of the tokens within
        `p95_ms`, and the curve over offload.
        """
        shipped = self.bundle.manifest.thresholds
        whole = self._layers(0, 1)
        upper = self._layers(None, 1)
        never = (1.0,) * len(shipped)
        streams = self._most(
            "cloud-only streams",
            whole,
            thresholds=never,
            p95_ms=p95_ms,
            link_s=0.0,
            seconds=seconds,
        )
        curve = []
        for thresholds in (shipped, *((value,) * len(shipped) for value in THRESHOLDS)):
            rate = recorded_offload_rate(self.recordings, thresholds)
            title = f"devices at an offload rate of {rate:.3f}"
            found = self._most(
                title, upper, thresholds=thresholds, p95_ms=p95_ms, link_s=link_s, seconds=seconds
            )
            curve.append({"thresholds": list(thresholds), "offload_rate": rate, **found})
        return {
            "collaborative": curve[0],
            "cloud_only": streams,
            "curve": sorted(curve, key=lambda p: p["offload_rate"]),
        }

    def _most(
        self,
        title: str,
        layers: UpperLayers,
        thresholds: Sequence[float],
        p95_ms: float,
        link_s: float,
        seconds: float,
    ) -> dict[str, Any]:
        rates = {0: 0.0}

        def measure(number: int) -> float:
            self._progress(f"{title}: {number}")
            p95, rates[number] = self._serve(layers, number, thresholds, link_s, seconds)
            return p95

        number, points = highest_within(p95_ms, measure)
        return {
            "devices": number,
            "tokens_per_s": rates[number],
            "p95_ms": {str(n): p95 for n, p95 in sorted(points.items())},
        }

    def _serve(
        self,
        layers: UpperLayers,
        num_devices: int,
        thresholds: Sequence[float],
        link_s: float,
        seconds: float,
    ) -> tuple[float, float]:
        """The time within which 95% of the tokens come, in milliseconds, and tokens a second of
        each device.
        """
        is_whole = layers.manifest.upload_layer == 0
        worker = ReplayWorker(layers, self._config(1), time.thread_time)
        devices = [
            ReplayDevice(
                name=f"device-{i}",
                bundle_id=layers.manifest.bundle_id,
                rows=self.embeddings if is_whole else self.uploads,
                thresholds=thresholds,
                link_s=link_s,
                start_s=WARM_UP_S * i / num_devices,
                works=not is_whole,
            )
            for i in range(num_devices)
        ]
        until = WARM_UP_S + seconds
        replays = [device.run(self._endless(i)) for i, device in enumerate(devices)]
        worker.serve(zip(devices, replays, strict=True), until)
        waits = [wait for device in devices for at, wait in device.tokens if at > WARM_UP_S]
        return 1e3 * quantiles(waits, n=20)[18], len(waits) / seconds / num_devices

    def _endless(self, first: int) -> Any:
        return islice(cycle(self.recordings), first % len(self.recordings), None)

    # Round trips.

    def round_trips(self, num_prompts: int, num_tokens: int, console: Console) -> dict[str, float]:
        """A token, in a fleet of real processes: broker, worker and one device."""
        exits = [exit_source(layer) for layer in self.bundle.manifest.exits]
        quiet = new_console()
        quiet.quiet = True
        result = {}
        with (
            TemporaryDirectory(prefix="fleet-bench-") as folder,
            running_fleet(self.bundle.folder, Path(folder), console) as (_, transport),
        ):
            client = PromptClient(transport)
            for mode in (Mode.COLLABORATIVE, Mode.VERIFIED):
                answers = []
                for number, prompt in enumerate(read_prompts(PROMPTS)[:num_prompts], 1):
                    self._progress(f"{mode}: answer {number} of {num_prompts}")
                    request = PromptRequest(prompt=prompt, max_new_tokens=num_tokens, mode=mode)
                    answers.append(stream_response(quiet, client, DEVICE, request, exits))
                result[str(mode)] = sum(a.round_trips for a in answers) / sum(
                    len(a.token_ids) for a in answers
                )
        return result

    def session_bytes(self) -> dict[str, int]:
        """Memory of the worker for each position of a session."""
        shape = self._layers(None, 1).new_pool(1).shape
        return {"cache": shape.cache_bytes, "hidden_states": shape.hidden_bytes}


def highest_within(limit: float, measure: Callable[[int], float]) -> tuple[int, dict[int, float]]:
    """The highest number, to a sixteenth of itself, whose measure is within a limit, and what was
    measured.

    Doubled until it is not, then halved in between.
    """
    points: dict[int, float] = {}
    low = 0
    high = 1
    while points.setdefault(high, measure(high)) <= limit and high < MAX_DEVICES:
        low = high
        high = 2 * high
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        points[middle] = measure(middle)
        low, high = (middle, high) if points[middle] <= limit else (low, middle)
    return low, points


@app.command()
def run(
    only: Annotated[str, typer.Option(help="Parts to run, separated by commas.")] = ",".join(PARTS),
    weights: Annotated[
        str, typer.Option(help="Weights of the worker: float32, bfloat16, int8 or int4.")
    ] = "float32",
    threads: Annotated[
        int, typer.Option(min=1, help="Threads of the worker, for throughput.")
    ] = os.cpu_count() or 1,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of each answer.")] = 48,
    p95_ms: Annotated[
        float, typer.Option(min=1, help="Limit of the 95th percentile of the time per token.")
    ] = 100.0,
    rtt_ms: Annotated[float, typer.Option(min=0, help="Round trip of a device's link.")] = 20.0,
    seconds: Annotated[
        float, typer.Option(min=1, help="Length of a measurement of devices, after a warm-up.")
    ] = 8.0,
    plot: Annotated[
        Path | None, path_option(help="Draw devices over the offload rate, *.svg or *.png.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure what one worker serves."""
    if plot:
        with needs("plots"):
            from benchmarks.plots import plot_devices
            from fleet.utils.plots import check_plot, save
        check_plot(plot)
    parts = parse_list(only, PARTS, "part")
    (chosen,) = parse_list(weights, get_args(Weights), "kind of weights")
    console = new_console(stderr=True)

    def progress(line: str) -> None:
        console.print(line, style="dim", highlight=False)

    bundle = Bundle.load(default_bundle(progress))
    bench = WorkerBench(bundle, chosen, tokens, progress)  # type: ignore[arg-type]  # checked above
    result: dict[str, Any] = {
        "machine": machine(),
        "torch": torch.__version__,
        "torch_instructions": torch.backends.cpu.get_cpu_capability(),
        "bundle_id": bundle.manifest.bundle_id,
        "weights": chosen,
        "bytes_per_position": bench.session_bytes(),
    }
    if "throughput" in parts:
        result |= {
            "threads": threads,
            "agreement": bench.agreement(),
            "sessions": bench.throughput(threads),
            **bench.one_position(threads),
        }
    if "devices" in parts:
        found = bench.devices(p95_ms, rtt_ms / 2e3, seconds)
        result["devices_per_worker"] = {
            kind: found[kind]["devices"] for kind in ("collaborative", "cloud_only")
        }
        result |= {"p95_ms": p95_ms, "rtt_ms": rtt_ms, "devices": found}
        if plot:
            save(plot_devices(result), plot)
    if "round-trips" in parts:
        result["round_trips_per_token"] = bench.round_trips(len(bench.recordings), tokens, console)
    if "weights" in parts:
        result["step_ms_by_weights"] = step_ms_by_weights(bundle, threads, progress)
    if as_json:
        print(json.dumps(result))
    else:
        print_result(new_console(), result)


def print_result(console: Console, result: dict[str, Any]) -> None:
    """Print the measurements as tables."""
    if "sessions" in result:
        _print_sessions(console, result)
    if "devices" in result:
        _print_devices(console, result)
    if "agreement" in result:
        line = f"agreement of {result['weights']} with float32: {result['agreement']:.4f}"
        console.print(line, highlight=False)
    if "step_ms_by_weights" in result:
        _print_weights(console, result["step_ms_by_weights"])
    for mode, rate in result.get("round_trips_per_token", {}).items():
        console.print(f"{mode}: {rate:.3f} round trips a token", highlight=False)


def _print_sessions(console: Console, result: dict[str, Any]) -> None:
    table = _table(
        f"sessions that ask for every token, {result['threads']} threads",
        ("sessions", "tokens/s", "of one session's", "p50, ms", "p99, ms"),
    )
    for number, row in result["sessions"].items():
        table.add_row(
            number,
            f"{row['tokens_per_s']:.0f}",
            f"{row['speedup']:.2f}",
            f"{row['assist_p50_ms']:.1f}",
            f"{row['assist_p99_ms']:.1f}",
        )
    console.print(table)
    for layer, milliseconds in result["one_position_ms"].items():
        console.print(
            f"one position from layer {layer} on: {milliseconds:.1f} ms, "
            f"{result['weights_mb'][layer]:.0f} MB read",
            highlight=False,
        )
    console.print(f"this machine reads {result['read_gb_per_s']:.1f} GB/s", highlight=False)


def _print_weights(console: Console, times: dict[str, dict[str, float]]) -> None:
    table = _table("ms of a step, by sessions", ("weights", *map(str, SESSIONS)))
    for kind, row in times.items():
        table.add_row(kind, *[f"{ms:.1f}" for ms in row.values()])
    console.print(table)


def _print_devices(console: Console, result: dict[str, Any]) -> None:
    table = _table(
        f"on one core, 95% of the tokens within {result['p95_ms']:g} ms, "
        f"round trip {result['rtt_ms']:g} ms",
        ("thresholds", "offload rate", "devices", "of cloud-only's", "tokens/s of each"),
    )
    streams = result["devices"]["cloud_only"]
    num_streams = streams["devices"]
    speed = f"{streams['tokens_per_s']:.1f}"
    table.add_row("cloud-only streams", "1.000", str(num_streams), "1.00", speed)
    for point in result["devices"]["curve"]:
        ratio = point["devices"] / num_streams if num_streams else float("inf")
        table.add_row(
            ", ".join(f"{value:.3f}" for value in point["thresholds"]),
            f"{point['offload_rate']:.3f}",
            str(point["devices"]),
            f"{ratio:.2f}",
            f"{point['tokens_per_s']:.1f}",
        )
    console.print(table)


def _table(title: str, headers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for header in headers:
        table.add_column(header, justify="right")
    return table


if __name__ == "__main__":
    run_command("benchmarks.worker", app)
