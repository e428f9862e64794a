"""The edge engine next to its peers: speed and fidelity of the whole model, and a device's cost.

    fleet bench edge [--presets balanced,int4,int8,fp32] [--rounds 7] [--only PARTS] [--no-peers]
        [--plot FILE] [--json]

Every engine runs in a process of its own and they take turns, round by round, so that other load on
the machine affects all of them. Peers are llama.cpp, as the wheel that pip gives and built for this
processor, on the model's own 4-bit file and on others made of it, OpenVINO GenAI on that file, and
onnxruntime-genai with its own int4 and int8. They are installed and built on first use, outside the
project's environment. Run it on an idle machine.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Final, get_args

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import breakdown, footprint
from benchmarks.engine_rounds import (
    PREFILL,
    PREFILLS,
    SPEED_PROMPT,
    EngineName,
    EngineRounds,
    Figures,
    token_ids,
)
from benchmarks.engines import EngineProcess
from benchmarks.fidelity import PROMPTS, ReferenceAnswer, default_answers
from benchmarks.graphs import EdgeGraphs
from benchmarks.native_llama import build_facts, native_build
from benchmarks.peers import NATIVE, native_peers, openvino_peer, peers
from fleet.bundles.instruction_sets import instruction_sets, processor_name
from fleet.errors import ConfigError
from fleet.utils.cli_runtime import run_command
from fleet.utils.console import new_console
from fleet.utils.optional_imports import needs
from fleet.utils.path_options import path_option
from onnx_export.config import QUANTIZATIONS, ExportConfig, Quantization
from onnx_export.default_bundle import default_bundle

OURS: Final = "ours"
DEFAULT_PRESET: Final[Quantization] = ExportConfig(out=Path(), exits=(1,)).quantization
EXITS: Final = (7, 8, 15, 24)
THREADS: Final = (1, 2)
STEPS: Final = 60
GROWTH_TOKENS: Final = 250
GROWTH_ANSWERS: Final = 40
PARTS: Final = ("speed", "prefill", "fidelity", "exits", "footprint", "profile", "growth")

Progress = Callable[[str], None]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def driver(bundle: Path, threads: int) -> list[str]:
    """Return the command of our engine's process."""
    module = "benchmarks.drivers.ours"
    return [sys.executable, "-m", module, "--model", str(bundle), "--threads", str(threads)]


class EdgeBench:
    """One run of the benchmark.

    `versions` and `idle_engines_cpu_percent` are known after `engines`.
    """

    def __init__(
        self,
        graphs: EdgeGraphs,
        presets: Sequence[Quantization],
        rounds: int,
        with_peers: bool,
        progress: Progress,
    ) -> None:
        self._graphs = graphs
        self._presets = presets
        self._rounds = rounds
        self._with_peers = with_peers
        self._progress = progress
        self.versions: dict[str, str] = {}
        self.idle_engines_cpu_percent = 0.0

    def _whole(self, preset: Quantization) -> Path:
        return self._graphs.bundle(self._graphs.num_layers, preset)

    def commands(self, threads: int) -> dict[EngineName, list[str]]:
        """Return the command of each engine, by engine and preset."""
        commands: dict[EngineName, list[str]] = {
            (OURS, preset): driver(self._whole(preset), threads) for preset in self._presets
        }
        for make in (native_peers, peers, openvino_peer) if self._with_peers else ():
            commands |= make(threads, self._progress)
        return commands

    def engines(
        self, parts: Sequence[str], answers: Sequence[ReferenceAnswer]
    ) -> list[dict[str, Any]]:
        """Return a row for each engine, preset and number of threads.

        Fidelity, and prompts of other lengths than `PREFILL`, are measured with the most threads
        only.
        """
        rows: list[dict[str, Any]] = []
        agreements: dict[EngineName, float] = {}
        for threads in reversed(THREADS):
            rounds = EngineRounds(self._rounds, threads, self._progress)
            with rounds.running(self.commands(threads)):
                figures = [rounds.built_for()]
                figures += [rounds.speed()] if "speed" in parts else []
                lengths = PREFILLS if threads == max(THREADS) else (PREFILL,)
                figures += [rounds.prefill(lengths)] if "prefill" in parts else []
                if answers and not agreements:
                    agreements = rounds.fidelity(answers)
            rows += engine_rows(threads, figures)
            self.versions |= rounds.versions
            self.idle_engines_cpu_percent = max(self.idle_engines_cpu_percent, rounds.idle_percent)
        return [row | {"agreement": agreements.get((row["engine"], row["preset"]))} for row in rows]

    def exit_steps(self) -> dict[str, float]:
        """Return the time of a step up to an exit, LM head included, over that of all layers."""
        threads = max(THREADS)
        prompt = token_ids(SPEED_PROMPT)
        num_layers = self._graphs.num_layers
        with ExitStack() as stack:
            engines = {}
            for layer in (*EXITS, num_layers):
                bundle = self._graphs.bundle(layer, DEFAULT_PRESET)
                engines[layer] = stack.enter_context(
                    EngineProcess(f"exit {layer}", driver(bundle, threads))
                )
            times: dict[int, list[float]] = {layer: [] for layer in engines}
            for i in range(self._rounds + 1):
                self._progress(f"steps that stop at an exit, round {i} of {self._rounds}")
                for layer, engine in engines.items():
                    time_ms = engine.ask("step_ms", prompt=prompt, steps=STEPS)["ms"]
                    if i:
                        times[layer].append(time_ms)
        whole = times[num_layers]
        return {
            str(layer): median(a / b for a, b in zip(times[layer], whole, strict=True))
            for layer in EXITS
        }

    def profile(self) -> dict[str, Any]:
        """Measure the breakdown of a step and of chunks, a step's growth with the position, and
        memory bandwidth.

        The machine's bandwidth stands next to that of the weights.
        """
        bundle = self._whole(DEFAULT_PRESET)
        result: dict[str, Any] = {
            "breakdown_us": {},
            "chunk_us": {},
            "position_ratio": {},
            "read_bandwidth_gb_per_s": {},
        }
        for threads in THREADS:
            rounds = []
            for i in range(1, self._rounds + 1):
                self._progress(f"profile with {threads} threads, round {i} of {self._rounds}")
                rounds.append(tuple(breakdown.profile_steps(bundle, threads).values()))
            result["breakdown_us"][str(threads)] = {
                kind: median(near[kind] for near, _ in rounds) for kind in rounds[0][0]
            }
            result["chunk_us"][str(threads)] = self._chunk_times(bundle, threads)
            result["position_ratio"][str(threads)] = {
                "without_attention": median(
                    breakdown.operators_only(far) / breakdown.operators_only(near)
                    for near, far in rounds
                ),
                "whole": median(sum(far.values()) / sum(near.values()) for near, far in rounds),
            }
            result["read_bandwidth_gb_per_s"][str(threads)] = (
                breakdown.read_bandwidth(threads) / 1e9
            )
        result["weights_mb"] = {
            preset: breakdown.graph_weight_bytes(self._whole(preset)) / 1e6
            for preset in self._presets
        }
        return result

    def _chunk_times(self, bundle: Path, threads: int) -> dict[str, dict[str, float]]:
        """Return the least time of each kind of work in chunks, by their number of positions."""
        rounds = [breakdown.profile_chunks(bundle, threads) for _ in range(self._rounds)]
        return {
            str(size): {kind: min(each[size][kind] for each in rounds) for kind in rounds[0][size]}
            for size in rounds[0]
        }

    def growth(self) -> dict[str, float]:
        """Return the growth of the engine's memory over many answers after a warm-up, in MB."""
        bundle = self._whole(DEFAULT_PRESET)
        self._progress(f"memory over {GROWTH_ANSWERS * GROWTH_TOKENS} tokens")
        with EngineProcess(OURS, driver(bundle, max(THREADS))) as engine:
            prompt = token_ids(SPEED_PROMPT)
            grown = engine.ask(
                "growth", prompt=prompt, answers=GROWTH_ANSWERS, new_tokens=GROWTH_TOKENS
            )
        return {f"{kind}_mb": megabytes for kind, megabytes in grown.items()}


def engine_rows(
    threads: int, figures: Sequence[Mapping[EngineName, Figures]]
) -> list[dict[str, Any]]:
    """Return the rows of the engines with their figures."""
    return [
        {"engine": engine, "preset": preset, "threads": threads}
        | {name: value for part in figures for name, value in part[engine, preset].items()}
        for engine, preset in figures[0]
    ]


def parse_list(text: str, choices: Sequence[str], kind_of_name: str) -> tuple[str, ...]:
    """Return the names between commas; raise ConfigError when one is unknown."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if unknown := [name for name in names if name not in choices]:
        raise ConfigError(
            f"unknown {kind_of_name} {', '.join(unknown)}: expected some of {', '.join(choices)}"
        )
    return names


@app.command()
def run(
    presets: Annotated[
        str, typer.Option(help=f"Our presets: {', '.join(QUANTIZATIONS)}.")
    ] = "balanced,int4,int8,fp32",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which the engines take turns.")] = 7,
    only: Annotated[str, typer.Option(help="Parts to run.")] = ",".join(PARTS),
    prompts: Annotated[Path, path_option(help="File of prompts for fidelity.")] = PROMPTS,
    with_peers: Annotated[
        bool, typer.Option("--peers/--no-peers", help="Measure other engines, too.")
    ] = True,
    plot: Annotated[
        Path | None, path_option(help="Plot speed and agreement into *.svg or *.png.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure the edge engine next to others, and the cost of a device."""
    if plot:
        with needs("plots"):
            from benchmarks.plots import plot_engines
            from fleet.utils.plots import check_plot, save
        check_plot(plot)
    console = new_console(stderr=True)
    parts = parse_list(only, PARTS, "part")
    chosen = parse_list(presets, get_args(Quantization), "preset")

    def progress(line: str) -> None:
        console.print(line, style="dim", highlight=False)

    graphs = EdgeGraphs(progress)
    # The presets are checked above.
    bench = EdgeBench(graphs, chosen, rounds, with_peers, progress)  # type: ignore[arg-type]
    result: dict[str, Any] = {"rows": [], "machine": machine()}
    answers = default_answers(graphs.model, prompts, progress) if "fidelity" in parts else []
    if {"speed", "prefill", "fidelity"} & set(parts):
        result["rows"] = bench.engines(parts, answers)
        result["versions"] = bench.versions
        result["idle_engines_cpu_percent"] = bench.idle_engines_cpu_percent
        result["builds"] = {NATIVE: build_facts(native_build(progress))} if with_peers else {}
    if "fidelity" in parts:
        result["agreement_tokens"] = sum(len(answer.answer) for answer in answers)
    if "exits" in parts:
        result["exit_step_ratio"] = bench.exit_steps()
    if "footprint" in parts:
        result |= footprint.measure_footprint(default_bundle(console.print))
    if "profile" in parts:
        result |= bench.profile()
    if "growth" in parts:
        result["growth_10000_tokens"] = bench.growth()
    if plot:
        save(plot_engines(result["rows"]), plot)
    if as_json:
        print(json.dumps(result))
    else:
        print_result(new_console(), result)


def machine() -> dict[str, Any]:
    """Return the machine that the figures hold for."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "instruction_sets": list(instruction_sets()),
    }


COLUMNS: Final = (
    "engine",
    "preset",
    "threads",
    "tokens/s",
    "quartiles",
    f"prompt of {PREFILL}",
    "agreement",
    "instructions",
)


def print_result(console: Console, result: dict[str, Any]) -> None:
    """Print the engines as a table, the rest as lines."""
    if result["rows"]:
        table = Table(title="the whole model, greedy; tokens/s", title_justify="left")
        for header in COLUMNS:
            table.add_column(header, justify="left" if header in COLUMNS[:2] else "right")
        for row in result["rows"]:
            table.add_row(*cells(row))
        console.print(table)
    for name, value in result.items():
        if name != "rows":
            console.print(f"{name}: {format_value(value)}", highlight=False)


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return the cells of a row; a figure that was not measured is empty."""
    has_speed = "tokens_per_s" in row
    prefill = row.get("prefill_tokens_per_s")
    return [
        row["engine"].removesuffix(f" {row['preset']}"),
        row["preset"],
        str(row["threads"]),
        f"{row['tokens_per_s']:.1f}" if has_speed else "",
        f"{row['tokens_per_s_low']:.1f} to {row['tokens_per_s_high']:.1f}" if has_speed else "",
        "" if prefill is None else f"{prefill:.0f}",
        "" if row["agreement"] is None else f"{row['agreement']:.4f}",
        widest(row["instruction_sets"]),
    ]


def widest(names: Sequence[str]) -> str:
    """Return the last of the vector instructions among an engine's instruction sets."""
    vectors = [name for name in names if "avx" in name.lower()] or names
    return vectors[-1] if vectors else ""


def format_value(value: Any) -> str:
    """Return a value as text: fractions with three digits, mappings in braces."""
    if isinstance(value, dict):
        return (
            "{" + ", ".join(f"{key}: {format_value(inner)}" for key, inner in value.items()) + "}"
        )
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run_command("benchmarks.edge", app)
