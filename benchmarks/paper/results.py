"""The folder of a run: its rows, its scores, and their conditions."""

from __future__ import annotations

import json
import os
import platform
import secrets
import time
from importlib.metadata import version
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.edge import machine
from benchmarks.paper.accuracy_summary import summary as accuracy
from benchmarks.paper.figures import figures
from benchmarks.paper.fit import HeldBack, fit_cost_model
from benchmarks.paper.report import Summary
from benchmarks.paper.rows import ModelSizes, Row, RowFile, Run, Scored
from fleet.bundles.manifest import Bundle
from fleet.errors import BundleError, ConfigError
from fleet.planning.splits import exit_agreement, whole_model

PACKAGES: Final = ("cecollm-fleet", "onnxruntime", "torch", "transformers")
CONDITIONS: Final = {
    "machine": "machine",
    "versions": "set of versions",
    "bundle_id": "bundle",
    "size": "size",
    "seed": "seed",
}


class Results:
    """Rows that were all measured under one `run`'s conditions."""

    def __init__(self, folder: Path, run: Run) -> None:
        self.folder = folder
        self.run = run
        self.rows: RowFile[Row] = RowFile(folder / "rows.jsonl", Row)
        self.scored: RowFile[Scored] = RowFile(folder / "scores.jsonl", Scored)

    @classmethod
    def open(cls, folder: Path) -> Results:
        """Open a folder of results; raise ConfigError when it has none."""
        if (run := _read_run(folder)) is None:
            raise ConfigError(
                f"nothing was measured in {folder}; run 'fleet bench paper', or give another --out"
            )
        return cls(folder, run)

    @classmethod
    def begin(cls, folder: Path, run: Run) -> Results:
        """Continue with the rows of a folder.

        Raises:
            ConfigError: they were measured under other conditions: medians over both would mean
                nothing.
        """
        previous = _read_run(folder)
        if previous is None:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "runs.jsonl").open("wb") as file:
                file.write(msgspec.json.encode(run) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            return cls(folder, run)
        for field, name in CONDITIONS.items():
            was = getattr(previous, field)
            now = getattr(run, field)
            if was != now:
                raise ConfigError(
                    f"{folder} holds rows measured with another {name}: {_show(was)}, "
                    f"now {_show(now)}; "
                    "give another --out, or move the folder away"
                )
        return cls(folder, previous)

    def summary(self) -> Summary:
        """Return all figures."""
        rows = [*self.rows]
        return Summary(
            run=self.run,
            figures=figures(rows, self.run.model),
            accuracy=accuracy(self.scored),
            held_back=_held_back(rows, self.run),
        )


def new_run(bundle: Bundle, size: str, seed: int) -> Run:
    """Return the present conditions."""
    return Run(
        run=secrets.token_hex(4),
        machine=msgspec.json.decode(msgspec.json.encode(machine())),
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        bundle_id=bundle.manifest.bundle_id,
        model=model_sizes(bundle),
        size=size,
        seed=seed,
        at=time.time(),
    )


def model_sizes(bundle: Bundle) -> ModelSizes:
    """Return sizes from the manifest, and the MLP's width from the cloud's configuration.

    Raises:
        BundleError: that cannot be read.
    """
    manifest = bundle.manifest
    path = bundle.path("cloud/config.json")
    try:
        intermediate = int(json.loads(path.read_text())["intermediate_size"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BundleError(
            f"{path}: expected a model's configuration ({error}); export the bundle again"
        ) from None
    model = manifest.model
    attention = 2 * model.head_dim * (model.num_attention_heads + model.num_key_value_heads)
    layer_parameters = model.hidden_size * (attention + 3 * intermediate)
    head_parameters = model.hidden_size * model.vocab_size
    return ModelSizes(
        name=model.name,
        num_layers=model.num_layers,
        exits=manifest.exits,
        split_layer=manifest.split_layer,
        upload_layer=manifest.upload_layer,
        thresholds=manifest.thresholds,
        layer_parameters=layer_parameters,
        head_parameters=head_parameters,
        whole=whole_model(manifest, head_parameters / layer_parameters),
        exit_agreement=exit_agreement(manifest, manifest.exits[-1])[0],
    )


def _held_back(rows: list[Row], run: Run) -> list[HeldBack]:
    """Return the errors of the fit; nothing where the rows are too few for one."""
    try:
        return fit_cost_model(rows, run)[1]
    except ConfigError:
        return []


def _read_run(folder: Path) -> Run | None:
    path = folder / "runs.jsonl"
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes().strip(), type=Run)
    except msgspec.MsgspecError as error:
        raise ConfigError(
            f"{path}: expected a run of this version, got something else ({error}); "
            "move the folder away"
        ) from None


def _show(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
