"""`fleet heads`: train, profile, evaluate and calibrate early exits."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer
from rich.console import Console

from fleet.bundles.calibration_file import keep_calibration, write_calibrated
from fleet.bundles.manifest import Bundle, Manifest
from fleet.cli.options import (
    MAX_NEW_TOKENS,
    MAX_ROWS,
    BundleOption,
    JsonOption,
    MemoryOption,
    PlotOption,
    memory_bytes,
)
from fleet.cli.progress import progress_bar
from fleet.cli.training import profile, train, write_drawn_prompts
from fleet.cli.views import numbers_table
from fleet.errors import ConfigError
from fleet.exits.calibration import (
    Calibration,
    calibrate,
    check_guarantee,
    expected_calibration_error,
    summarize_thresholds,
)
from fleet.exits.records import Recording, Records, load_recording, save_recording
from fleet.exits.thresholds import (
    OperatingPoint,
    best_thresholds,
    evaluate_thresholds,
    frontier,
)
from fleet.server.supervisor import resolve_bundle
from fleet.utils.cli_runtime import check_free, check_writable
from fleet.utils.command_group import CommandGroup
from fleet.utils.console import new_console
from fleet.utils.optional_imports import needs
from fleet.utils.path_options import path_option
from fleet.utils.paths import user_cache_folder
from fleet.utils.prompt_file import PromptFile
from fleet.version import __version__

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    help="Train, profile, evaluate and calibrate exits.",
    rich_markup_mode=None,
)
app.command()(train)
app.command()(profile)
app.command("draw")(write_drawn_prompts)

TARGETS: Final = (0.98, 0.95, 0.90)

PromptsOption = Annotated[
    list[Path] | None, path_option(help="File of prompts, .jsonl or text; repeatable.")
]
TokensOption = Annotated[
    int,
    typer.Option(
        "--max-new-tokens", min=1, max=MAX_NEW_TOKENS, help="Maximum length of an answer."
    ),
]
LimitOption = Annotated[
    int | None, typer.Option(min=1, max=MAX_ROWS, help="Maximum number of prompts.")
]
RecordsOption = Annotated[
    Path | None,
    path_option(help="Keep the recording here or read it from here (default: user's cache)."),
]
TargetAgreementOption = Annotated[
    float, typer.Option(help="Mean agreement of an answer with the full model.")
]
ConfidenceOption = Annotated[
    float, typer.Option(help="Confidence that new text of this kind keeps the target.")
]
OutOption = Annotated[
    Path | None, path_option(help="Write a calibrated copy of the bundle here, not the bundle.")
]
WriteOption = Annotated[
    Path | None, path_option(help="Also keep the calibration here, for 'fleet export'.")
]


def load_or_record(
    bundle: Bundle,
    prompts: Sequence[PromptFile],
    max_new_tokens: int,
    path: Path | None,
    limit: int | None = None,
    check: Callable[[int], None] = lambda _: None,
    memory: int | None = None,
) -> Recording:
    """The exits along the full model's answers: from the file `path` if it exists, else recorded.

    `check` receives the number of answers before they are recorded, and may raise an error.
    `memory`, in bytes, limits the number of answers at once.

    Raises:
        ConfigError: there are no prompts, or `path` is of another bundle or other answers.
    """
    hashes = tuple(each.sha256 for each in prompts)
    texts = [text for each in prompts for text in each.texts][:limit]
    if path is not None and path.exists():
        recording = load_recording(path)
        inputs = (hashes, len(texts), max_new_tokens) if prompts else None
        _check_recording(recording, bundle, inputs, path)
        print_note(f"the recording is read from {path}")
        return recording
    if not prompts:
        raise ConfigError(
            "no prompts: give --prompts FILE, or --records FILE with an earlier recording"
        )
    check(len(texts))
    recording = Recording(
        records=_record(bundle, texts, max_new_tokens, check, memory),
        parts_sha256=parts_sha256(bundle.manifest),
        prompts_sha256=hashes,
        num_prompts=len(texts),
        max_new_tokens=max_new_tokens,
    )
    if path is not None:
        save_recording(recording, path)
        print_note(f"the recording is kept in {path}")
    return recording


def print_note(line: str) -> None:
    """Print a line on stderr."""
    new_console(stderr=True).print(line, soft_wrap=True)


def cached_recording(
    bundle: Bundle, prompts: Sequence[PromptFile], max_new_tokens: int, limit: int | None = None
) -> Path | None:
    """The file of a recording in the user's cache; none without prompts or a writable cache."""
    if not prompts:
        return None
    hashes = [each.sha256 for each in prompts]
    inputs = [__version__, parts_sha256(bundle.manifest), hashes, max_new_tokens, limit]
    key = hashlib.sha256(msgspec.json.encode(inputs)).hexdigest()[:16]
    folder = user_cache_folder() / "recordings"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder / f"{key}.npz"


def _record(
    bundle: Bundle,
    texts: Sequence[str],
    max_new_tokens: int,
    check: Callable[[int], None],
    memory: int | None,
) -> Records:
    from fleet.cli.record_exits import record

    threads = len(os.sched_getaffinity(0))
    with progress_bar("answering", len(texts)) as progress:
        records = record(
            bundle, texts, max_new_tokens, threads, progress, check=check, memory=memory
        )
    if num_too_long := len(texts) - records.num_answers:
        print_note(
            f"{num_too_long} of {len(texts)} prompts are too long for the model and were left out"
        )
    return records


def _check_recording(
    recording: Recording,
    bundle: Bundle,
    inputs: tuple[tuple[str, ...], int, int] | None,
    path: Path,
) -> None:
    """Raise ConfigError for another bundle, or other `inputs`: prompts, their number, tokens."""
    if recording.parts_sha256 != parts_sha256(bundle.manifest):
        raise ConfigError(
            f"{path} was recorded with another bundle; remove it, or give another --records"
        )
    recorded = (recording.prompts_sha256, recording.num_prompts, recording.max_new_tokens)
    if inputs not in (None, recorded):
        raise ConfigError(
            f"{path} was recorded with other prompts or another --max-new-tokens "
            f"({recording.max_new_tokens}); leave --prompts out to read it, remove it, "
            "or give another --records"
        )


def parts_sha256(manifest: Manifest) -> str:
    """Hash of all files that determine exits and full model, which thresholds do not."""
    parts = (manifest.exits, manifest.upload_layer, manifest.files)
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def open_bundle(folder: Path | None) -> Bundle:
    """Load the bundle in `folder`, by default the default model's."""
    return Bundle.load(resolve_bundle(folder, new_console(stderr=True).print))


def evaluation(records: Records, thresholds: Sequence[float]) -> dict[str, Any]:
    """The output of `fleet heads evaluate --json`."""
    agreement = records.agreement()
    exits = {
        str(layer): {
            "agreement": agreement[layer],
            "ece": expected_calibration_error(records.confidence[:, i], records.agrees[:, i]),
        }
        for i, layer in enumerate(records.exits)
    }
    deployed: dict[str, Any] = {**summarize_thresholds(records, thresholds)}
    return {
        "tokens": len(records),
        "exits": exits,
        "curve": [point_json(records, point) for point in frontier(records)],
        "at": {f"{each:.2f}": best_thresholds(records, each).offload_rate for each in TARGETS},
        "deployed": deployed | {"thresholds": by_exit(records, thresholds)},
    }


def by_exit(records: Records, values: Sequence[float]) -> dict[str, float]:
    """Values by exit."""
    return {str(layer): value for layer, value in zip(records.exits, values, strict=True)}


def point_json(records: Records, point: OperatingPoint) -> dict[str, Any]:
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
    limit: LimitOption = None,
    records: RecordsOption = None,
    memory: MemoryOption = None,
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the exits of a bundle, as deployed, along the full model's own greedy answers."""
    check_writable(records=records)
    if plot:
        with needs("plots"):
            from fleet.exits.plot import plot_curves
            from fleet.utils.plots import check_plot, save
        check_plot(plot)
    opened = open_bundle(bundle)
    files = list(map(PromptFile.read, prompts or ()))
    path = records or cached_recording(opened, files, max_new_tokens, limit)
    measured = load_or_record(
        opened, files, max_new_tokens, path, limit, memory=memory_bytes(memory)
    ).records
    thresholds = opened.manifest.thresholds
    result = evaluation(measured, thresholds)
    if plot:
        name = f"exits {', '.join(map(str, measured.exits))}"
        save(plot_curves(opened.manifest.model.name, {name: frontier(measured)}), plot)
    if as_json:
        print(json.dumps(result))
        return
    console = new_console()
    print_exits(console, result)
    print_targets(console, measured, thresholds)


def print_exits(console: Console, result: dict[str, Any]) -> None:
    """Print agreement and calibration error, a row for each exit."""
    headers = ("exit", "agreement", "calibration error")
    table = numbers_table(f"exits on {result['tokens']} tokens", headers)
    for layer, values in result["exits"].items():
        table.add_row(layer, f"{values['agreement']:.3f}", f"{values['ece']:.3f}")
    console.print(table)


def print_targets(console: Console, records: Records, deployed: Sequence[float]) -> None:
    """Print the offload rate: at some agreements with the best thresholds, and as deployed."""
    exits = [f"exit {layer}" for layer in records.exits]
    table = numbers_table("offload rate", ("thresholds", "agreement", "offload", *exits))
    points = {f"best for {each:.2f}": best_thresholds(records, each) for each in TARGETS}
    points["the bundle's"] = evaluate_thresholds(records, deployed)
    for name, point in points.items():
        limits = map(threshold_text, point.thresholds)
        table.add_row(name, f"{point.agreement:.3f}", f"{point.offload_rate:.3f}", *limits)
    console.print(table)


def threshold_text(threshold: float) -> str:
    """A threshold with three digits, or "off"."""
    return "off" if threshold >= 1 else f"{threshold:.3f}"


@app.command("calibrate")
def calibrate_command(
    bundle: BundleOption = None,
    prompts: PromptsOption = None,
    target_agreement: TargetAgreementOption = 0.98,
    confidence: ConfidenceOption = 0.95,
    max_new_tokens: TokensOption = 64,
    records: RecordsOption = None,
    memory: MemoryOption = None,
    out: OutOption = None,
    write: WriteOption = None,
    as_json: JsonOption = False,
) -> None:
    """Choose thresholds that keep a target agreement, and write them into the bundle."""
    check_writable(records=records, write=write)
    if out is not None:
        check_free(out)
    opened = open_bundle(bundle)
    files = list(map(PromptFile.read, prompts or ()))
    check = partial(check_guarantee, target=target_agreement, confidence=confidence)
    path = records or cached_recording(opened, files, max_new_tokens)
    recording = load_or_record(
        opened, files, max_new_tokens, path, check=check, memory=memory_bytes(memory)
    )
    thresholds, calibration = calibrate(
        recording.records, target_agreement, confidence, recording.prompts_sha256
    )
    manifest = write_calibrated(opened, thresholds, calibration, out)
    if write is not None:
        keep_calibration(manifest, write)
    point = evaluate_thresholds(recording.records, thresholds)
    if as_json:
        summary = {"bundle_id": manifest.bundle_id} | point_json(recording.records, point)
        print(json.dumps(summary | {"calibration": msgspec.to_builtins(calibration)}))
        return
    print_calibration(new_console(), calibration, thresholds)
    print(
        f"with confidence {confidence} an answer's expected agreement is at least "
        f"{target_agreement}; here it offloads {point.offload_rate:.1%} of the tokens"
    )
    print(f"bundle {manifest.bundle_id} in {out or opened.folder}")


def print_calibration(
    console: Console, calibration: Calibration, thresholds: Sequence[float]
) -> None:
    """Print a row for each exit."""
    title = f"{calibration.num_answers} answers, {calibration.num_tokens} tokens"
    headers = ("exit", "threshold", "agreement", "calibration error", "scaled")
    table = numbers_table(title, headers)
    for (layer, fit), threshold in zip(calibration.exits.items(), thresholds, strict=True):
        errors = (f"{fit.ece:.3f}", f"{fit.scaled_ece:.3f}")
        table.add_row(layer, threshold_text(threshold), f"{fit.agreement:.3f}", *errors)
    console.print(table)
