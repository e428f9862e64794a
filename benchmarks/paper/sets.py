"""Samples of the paper's data sets, from files or the Hugging Face hub (docs/benchmarks.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Final, NamedTuple

from benchmarks.paper.tasks import TASKS, Row
from benchmarks.paper.tasks import Sample as Sample
from fleet.errors import ConfigError, MissingExtraError
from fleet.utils.json_text import parse_unique_json
from fleet.utils.text_files import read_text
from fleet.utils.validation import JSON_ERRORS

HUB_TIMEOUT_S: Final = 5.0


class HubSet(NamedTuple):
    """A data set on the hub.

    A `revision` is the hub's own conversion of a data set that is a program.
    """

    name: str
    split: str
    revision: str | None = None


HUB: Final = {
    "boolq": HubSet("google/boolq", "validation"),
    "quac": HubSet("allenai/quac", "validation", "refs/convert/parquet"),
    "imdb": HubSet("stanfordnlp/imdb", "test"),
    "xsum": HubSet("EdinburghNLP/xsum", "test", "refs/convert/parquet"),
    "alpaca": HubSet("tatsu-lab/alpaca", "train"),
}


def load_samples(
    name: str,
    num: int,
    seed: int,
    source: Path | None,
    *,
    fits: Callable[[str], bool] = lambda _: True,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Sample]:
    """Return `num` samples of a data set, or all; fewer of the same seed are the first of these.

    `source` is a folder with `<name>.jsonl`, or with a folder `<name>` for `datasets.load_dataset`;
    None is the hub. Prompts that do not fit are left out, and `progress` receives their number.

    Raises:
        ConfigError: no such data set or file, the hub does not respond, or a row is not as
            expected.
        MissingExtraError: the package `datasets` is needed and not installed.
    """
    if name not in TASKS:
        raise ConfigError(f"unknown data set {name!r}: expected one of {', '.join(TASKS)}")
    rows, where = _rows(name, source)
    samples: list[Sample] = []
    num_long = 0
    for number in Random(seed).sample(range(len(rows)), len(rows)):
        if len(samples) == num:
            break
        sample = _sample(name, number, rows[number], seed, where)
        if sample and fits(sample.prompt):
            samples.append(sample)
        elif sample:
            num_long += 1
    if num_long:
        progress(f"{name}: {num_long} prompts are too long and were left out")
    if not samples:
        raise ConfigError(f"{where(0)}: expected samples of {name}, got none that fit")
    return samples


def _sample(
    name: str, number: int, row: Row, seed: int, where: Callable[[int], str]
) -> Sample | None:
    try:
        return TASKS[name].sample(number, row, Random(f"{seed} {number}"))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ConfigError(
            f"{where(number)}: expected a row of {name} (docs/benchmarks.md, Data), "
            f"got one with {reason}"
        ) from None


def _rows(name: str, source: Path | None) -> tuple[Sequence[Row], Callable[[int], str]]:
    """Return rows, and a function that names one in a message."""
    if source is None:
        hub = HUB[name]
        return _hub_rows(name, hub), lambda number: f"{hub.name}, row {number}"
    path = source / f"{name}.jsonl"
    if path.is_file():
        rows = _file_rows(path)
        lines = [line for line, _ in rows]
        return [
            row for _, row in rows
        ], lambda number: f"{path}, line {lines[number]}" if lines else str(path)
    if (source / name).is_dir():
        return _dataset(
            str(source / name), HUB[name].split
        ), lambda number: f"{source / name}, row {number}"
    raise ConfigError(
        f"expected {path} or a folder {source / name}, found neither; "
        "see docs/benchmarks.md, Data, for their content"
    )


def _file_rows(path: Path) -> list[tuple[int, Row]]:
    """Return (number of the line, row) of a file of JSON lines."""
    rows = []
    for number, line in enumerate(read_text(path, "expected JSON lines").split("\n"), 1):
        try:
            if line.strip():
                rows.append((number, parse_unique_json(line)))
        except JSON_ERRORS as error:
            raise ConfigError(
                f"{path}, line {number}: expected a JSON object, got something else ({error})"
            ) from None
    return rows


def _hub_rows(name: str, hub: HubSet) -> Sequence[Row]:
    try:
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise _no_datasets() from None
    local = f"put {name}.jsonl into a folder and name that as the source (docs/benchmarks.md, Data)"
    try:
        if not constants.HF_HUB_OFFLINE:  # else only the cache is used
            HfApi().dataset_info(hub.name, timeout=HUB_TIMEOUT_S)
    except (OSError, HfHubHTTPError) as error:  # a failed request is an OSError there
        reason = str(error).strip().splitlines()[0][:200]
        raise ConfigError(
            f"{hub.name} cannot be fetched from the hub ({reason}); go online, or {local}"
        ) from None
    return _dataset(hub.name, hub.split, hub.revision)


def _dataset(path: str, split: str, revision: str | None = None) -> Sequence[Row]:
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise _no_datasets() from None
    try:
        rows: Sequence[Row] = load_dataset(path, split=split, revision=revision)
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ConfigError(f"cannot load the data set {path}, split {split}: {reason}") from None
    return rows


def _no_datasets() -> MissingExtraError:
    return MissingExtraError(
        "the hub's data sets need the package datasets, which is not installed: "
        "pip install 'cecollm-fleet[bench]', or name a folder of JSON lines as the source "
        "(docs/benchmarks.md, Data)"
    )
