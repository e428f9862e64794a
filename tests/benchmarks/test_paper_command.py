"""`fleet bench paper`: one folder is one run's, and can be shown and fitted at any time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from benchmarks.paper import command
from benchmarks.paper.command import PARTS, app, keep_fit
from benchmarks.paper.results import Results, model_sizes, new_run
from benchmarks.paper.rows import Row, RowFile
from benchmarks.paper.sizes import SIZES, Size
from fleet.bundles.manifest import Bundle
from fleet.errors import ConfigError
from fleet.planning.cost_model import read_fits
from tests.benchmarks.paper_rows import RUN, linear_rows, row


def bench(*arguments: str) -> None:
    app(args=list(arguments), standalone_mode=False)


@pytest.fixture
def measured(tmp_path: Path) -> Results:
    """A folder with rows of every link."""
    results = Results.begin(tmp_path / "rows", RUN)
    for each in linear_rows(samples=2):
        results.rows.add(each)
    return results


def test_a_run_goes_on_where_it_was(measured: Results) -> None:
    again = Results.begin(measured.folder, msgspec.structs.replace(RUN, run="r2", at=2.0))
    assert again.run == RUN
    assert len(again.rows) == len(measured.rows)
    assert Results.open(measured.folder).run == RUN


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bundle_id": "c" * 32}, "with another bundle: bbb.*, now ccc"),
        (
            {"machine": {"processor": "another", "cores": 2}},
            "with another machine: .*a test's.*, now .*another",
        ),
        ({"versions": {"torch": "3"}}, "with another set of versions"),
        ({"seed": 1}, "with another seed: 0, now 1; give another --out"),
        ({"size": "small"}, "with another size: full, now small"),
    ],
)
def test_rows_of_other_conditions_are_refused(
    measured: Results, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        Results.begin(measured.folder, msgspec.structs.replace(RUN, **changes))


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing was measured in .*; run 'fleet bench paper'"):
        Results.open(tmp_path)
    (tmp_path / "runs.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="expected a run of this version"):
        Results.open(tmp_path)


def test_sizes_are_those_of_the_bundles_model(tiny_bundle: Bundle) -> None:
    sizes = model_sizes(tiny_bundle)
    assert (sizes.num_layers, sizes.exits, sizes.split_layer) == (4, (1, 2), 2)
    assert sizes.layer_parameters == 64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3
    assert sizes.head_parameters == 384 * 64
    assert sizes.whole is not None
    assert (sizes.whole.num_layers, sizes.whole.head_layers) == (4, sizes.head_layers)
    assert sizes.exit_agreement is None  # the bundle is not calibrated
    run = new_run(tiny_bundle, "small", 3)
    assert (run.bundle_id, run.seed, run.size) == (tiny_bundle.manifest.bundle_id, 3, "small")
    assert {"python", "torch", "onnxruntime"} <= set(run.versions)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--size", "huge"), "--size 'huge': expected one of small, medium, full"),
        (("--only", "table,lunch"), f"unknown part lunch: expected some of {', '.join(PARTS)}"),
        (("--data", "/no/sets"), "--data /no/sets: expected a folder"),
        (("--fit", "--out", "/no/rows"), "nothing was measured in /no/rows"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        bench(*arguments)


def test_the_fleets_command_hands_its_options_on() -> None:
    command = [sys.executable, "-m", "fleet.cli", "bench", "paper", "--size", "huge"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("fleet: --size 'huge': expected one of")


def test_every_part_is_measured_once_and_shown(
    tmp_path: Path,
    tiny_bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[object] = []

    def load(
        name: str, num: int, seed: int, source: Path | None, **options: object
    ) -> list[SimpleNamespace]:
        assert set(options) == {"fits", "progress"}
        return [SimpleNamespace(prompt=f"{name} {i} of {seed} from {source}") for i in range(num)]

    def fits(bundle: Bundle, size: Size) -> Callable[[str], bool]:
        return lambda prompt: True

    def measure(
        size: Size,
        bundle: Bundle,
        samples: Callable[[str, int], Sequence[str]],
        rows: RowFile[Row],
        run: str,
        progress: Callable[[str], None],
        parts: Sequence[str],
    ) -> None:
        calls.append((size, bundle.manifest.bundle_id, samples("alpaca", 2), parts))
        rows.add(row("cloud_only", run=run))

    for name, function in (
        ("measure_rows", measure),
        ("load_samples", load),
        ("fits", fits),
    ):
        monkeypatch.setattr(command, name, function)
    where = (
        "--bundle",
        str(tiny_bundle.folder),
        "--out",
        str(tmp_path / "rows"),
        "--seed",
        "5",
        "--json",
    )
    bench(
        *where,
        "--only",
        "latency,table",
        "--data",
        str(tmp_path),
        "--plot",
        str(tmp_path / "pictures"),
    )
    prompts = [f"alpaca {i} of 5 from {tmp_path}" for i in range(2)]
    assert calls == [
        (SIZES["small"], tiny_bundle.manifest.bundle_id, prompts, ("table", "latency"))
    ]
    first = json.loads(capsys.readouterr().out)
    assert [one["system"] for one in first["figures"]] == ["cloud_only"]
    assert (tmp_path / "pictures/paper-time.svg").exists()
    bench(*where, "--only", "")
    assert len(calls) == 1
    assert json.loads(capsys.readouterr().out) == first


def test_the_fit_is_saved_for_the_planner(
    measured: Results,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(command, "DATA", tmp_path / "plan.json")
    bench("--fit", "--out", str(measured.folder), "--json")
    shown = json.loads(capsys.readouterr().out)
    (fitted,) = read_fits(tmp_path / "plan.json")
    assert shown["fit"] == json.loads(msgspec.json.encode(fitted))
    assert {one["system"] for one in shown["held_back"]} == {
        setting.name for setting in fitted.settings
    }
    bench("--fit", "--out", str(measured.folder))
    assert "are within 15%" in capsys.readouterr().out


def test_a_fit_takes_the_place_of_its_own_kind_only(measured: Results, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    keep_fit(measured, path)
    model = msgspec.structs.replace(RUN.model, exits=(16, 24))
    measured.run = msgspec.structs.replace(RUN, model=model, bundle_id="d" * 32)
    keep_fit(measured, path)
    assert [fit.exits for fit in read_fits(path)] == [(16, 24), (24,)]
    measured.run = msgspec.structs.replace(RUN, machine={"processor": "another"})
    keep_fit(measured, path)
    assert [fit.machine for fit in read_fits(path)] == [{"processor": "another"}]
