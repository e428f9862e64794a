"""`fleet heads`: train, profile, evaluate and calibrate early exits."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fleet.bundles.calibration_file import keep_calibration, write_calibrated
from fleet.bundles.manifest import Bundle, Manifest, hash_file
from fleet.cli.training import draw, profile, train
from fleet.errors import ConfigError
from fleet.exits.calibration import calibrate, expected_calibration_error, measured_on
from fleet.exits.records import Recording, Records, load_recording, save_recording
from fleet.exits.thresholds import Point, best_thresholds, frontier, measure
from fleet.utils.cli_runtime import check_free, check_writable
from fleet.utils.optional_imports import load
from fleet.utils.prompt_file import read_prompts

app = typer.Typer(
    no_args_is_help=True,
    help="Train, profile, evaluate and calibrate exits.",
    rich_markup_mode=None,
)
app.command()(train)
app.command()(profile)
app.command()(draw)

AT = (0.98, 0.95, 0.90)
BundleOption = Annotated[
    Path | None, typer.Option(help="Bundle's folder (default: the default model's).")
]
PromptsOption = Annotated[
    list[Path] | None, typer.Option(help="File of prompts, .jsonl or text; can be repeated.")
]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]
RecordsOption = Annotated[
    Path | None, typer.Option(help="Keep what was recorded here, or read it when it exists.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def recorded(
    bundle: Bundle,
    prompts: Sequence[Path],
    max_new_tokens: int,
    kept: Path | None,
    limit: int | None = None,
) -> Recording:
    """What every exit says along the full model's answers: out of the file `kept`, or recorded now.

    Raises:
        ConfigError: there are no prompts, or `kept` is of another bundle or other answers.
    """
    parts = parts_sha256(bundle.manifest)
    hashes = tuple(hash_prompts(path) for path in prompts)
    texts = [text for path in prompts for text in read_prompts(path)][:limit]
    if kept is not None and kept.exists():
        recording = load_recording(kept)
        if recording.parts_sha256 != parts:
            raise ConfigError(
                f"{kept} was recorded with another bundle; remove it, or give another --records"
            )
        was = recording.prompts_sha256, recording.num_prompts, recording.max_new_tokens
        if prompts and was != (hashes, len(texts), max_new_tokens):
            raise ConfigError(
                f"{kept} was recorded with other prompts or another --max-new-tokens ({recording.max_new_tokens}); "
                "leave --prompts out to read it, remove it, or give another --records"
            )
        return recording
    if not prompts:
        raise ConfigError(
            "no prompts: give --prompts FILE, or --records FILE with an earlier recording"
        )
    from fleet.cli.record_exits import record

    console = Console(stderr=True)
    columns = TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("answering", total=len(texts))
        threads = len(os.sched_getaffinity(0))
        records = record(
            bundle, texts, max_new_tokens, threads, lambda done: bar.update(task, completed=done)
        )
    if left_out := len(texts) - records.num_answers:
        console.print(
            f"{left_out} of {len(texts)} prompts are too long for the model and were left out"
        )
    recording = Recording(
        records=records,
        parts_sha256=parts,
        prompts_sha256=hashes,
        num_prompts=len(texts),
        max_new_tokens=max_new_tokens,
    )
    if kept is not None:
        save_recording(recording, kept)
    return recording


def parts_sha256(manifest: Manifest) -> str:
    """Of what decides what the exits and the full model say: all files, but not the thresholds."""
    parts = manifest.exits, manifest.upload_layer, manifest.files
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def hash_prompts(path: Path) -> str:
    """SHA-256 of a file of prompts.

    Raises:
        ConfigError: it cannot be read.
    """
    read_prompts(path)
    return hash_file(path)


def open_bundle(folder: Path | None) -> Bundle:
    """The bundle in `folder`, or the default model's."""
    from fleet.server.supervisor import resolve_bundle

    return Bundle.load(resolve_bundle(folder, Console(stderr=True).print))


def evaluation(records: Records, thresholds: Sequence[float]) -> dict[str, Any]:
    """What `fleet heads evaluate --json` prints."""
    agreement = records.agreement()
    exits = {
        str(layer): {
            "agreement": agreement[layer],
            "ece": expected_calibration_error(records.confidence[:, i], records.agrees[:, i]),
        }
        for i, layer in enumerate(records.exits)
    }
    return {
        "tokens": len(records),
        "exits": exits,
        "curve": [point_json(records, point) for point in frontier(records)],
        "at": {f"{target:.2f}": best_thresholds(records, target).offload_rate for target in AT},
        "deployed": measured_on(records, thresholds) | {"thresholds": by_exit(records, thresholds)},
    }


def by_exit(records: Records, values: Sequence[float]) -> dict[str, float]:
    """Values by exit."""
    return {str(layer): value for layer, value in zip(records.exits, values, strict=True)}


def point_json(records: Records, point: Point) -> dict[str, Any]:
    """One point of the curve."""
    return {
        "agreement": point.agreement,
        "offload_rate": point.offload_rate,
        "thresholds": by_exit(records, point.thresholds),
    }


@app.command()
def evaluate(
    bundle: BundleOption = None,
    prompts: PromptsOption = None,
    max_new_tokens: TokensOption = 64,
    limit: Annotated[int | None, typer.Option(help="Only the first prompts.")] = None,
    records: RecordsOption = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the curve into *.svg or *.png.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the exits of a bundle, as deployed, along the full model's own greedy answers."""
    check_writable(records=records)
    if plot:
        load("fleet.utils.plots").check_plot(plot)
    opened = open_bundle(bundle)
    found = recorded(opened, prompts or (), max_new_tokens, records, limit).records
    thresholds = opened.manifest.thresholds
    result = evaluation(found, thresholds)
    if plot is not None:
        name = f"exits {', '.join(map(str, found.exits))}"
        figure = load("fleet.exits.plot").plot_curves(
            opened.manifest.model.name, {name: frontier(found)}
        )
        load("fleet.utils.plots").save(figure, plot)
    if as_json:
        print(json.dumps(result))
        return
    console = Console()
    print_exits(console, result)
    print_targets(console, found, thresholds)


def print_exits(console: Console, result: dict[str, Any]) -> None:
    """Agreement and calibration error, a row an exit."""
    table = Table(title=f"exits on {result['tokens']} tokens")
    for header in ("exit", "agreement", "calibration error"):
        table.add_column(header, justify="right")
    for layer, values in result["exits"].items():
        table.add_row(layer, f"{values['agreement']:.3f}", f"{values['ece']:.3f}")
    console.print(table)


def print_targets(console: Console, records: Records, deployed: Sequence[float]) -> None:
    """Offload at some agreements with the best thresholds on these very tokens, and with the bundle's."""
    table = Table(title="offload rate")
    for header in (
        "thresholds",
        "agreement",
        "offload",
        *(f"exit {layer}" for layer in records.exits),
    ):
        table.add_column(header, justify="right")
    rows = [(f"best for {target:.2f}", best_thresholds(records, target)) for target in AT]
    for name, point in [*rows, ("the bundle's", measure(records, deployed))]:
        limits = ["off" if threshold >= 1 else f"{threshold:.3f}" for threshold in point.thresholds]
        table.add_row(name, f"{point.agreement:.3f}", f"{point.offload_rate:.3f}", *limits)
    console.print(table)


@app.command("calibrate")
def calibrate_command(
    bundle: BundleOption = None,
    prompts: PromptsOption = None,
    target_agreement: Annotated[
        float, typer.Option(help="Of an answer with the full model, on average.")
    ] = 0.98,
    confidence: Annotated[
        float, typer.Option(help="That the target is kept on new text of this kind.")
    ] = 0.95,
    max_new_tokens: TokensOption = 64,
    records: RecordsOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write a calibrated copy of the bundle here, not into the bundle."),
    ] = None,
    write: Annotated[
        Path | None, typer.Option(help="Also keep the calibration here, for 'fleet export'.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Choose a threshold for each exit that keeps a target agreement, and write them into the bundle."""
    check_writable(records=records, write=write)
    if out is not None:
        check_free(out)
    opened = open_bundle(bundle)
    recording = recorded(opened, prompts or (), max_new_tokens, records)
    found = recording.records
    thresholds, calibration = calibrate(
        found, target_agreement, confidence, recording.prompts_sha256
    )
    manifest = write_calibrated(opened, thresholds, calibration, out)
    if write is not None:
        keep_calibration(manifest, write)
    point = measure(found, thresholds)
    if as_json:
        summary = {"bundle_id": manifest.bundle_id, "thresholds": by_exit(found, thresholds)}
        measured = {"agreement": point.agreement, "offload_rate": point.offload_rate}
        print(json.dumps(summary | measured | {"calibration": msgspec.to_builtins(calibration)}))
        return
    console = Console()
    table = Table(title=f"{calibration.num_answers} answers, {calibration.num_tokens} tokens")
    for header in ("exit", "threshold", "agreement", "calibration error", "scaled"):
        table.add_column(header, justify="right")
    for (layer, exit_), threshold in zip(calibration.exits.items(), thresholds, strict=True):
        shown = "off" if threshold >= 1 else f"{threshold:.3f}"
        table.add_row(
            layer, shown, f"{exit_.agreement:.3f}", f"{exit_.ece:.3f}", f"{exit_.scaled_ece:.3f}"
        )
    console.print(table)
    print(
        f"with confidence {confidence} an answer's expected agreement is at least {target_agreement}; "
        f"here it offloads {point.offload_rate:.1%} of the tokens"
    )
    print(f"bundle {manifest.bundle_id} in {out or opened.folder}")
