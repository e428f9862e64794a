"""A calibrated bundle keeps its promise on prompts outside training and calibration."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_agent.config import AgentConfig
from fleet.bundles.calibration_file import keep_calibration, read_calibration, write_calibrated
from fleet.bundles.manifest import Bundle, hash_file
from fleet.cli.heads import cached_recording, load_or_record
from fleet.cli.record_exits import ExitRecorder, batch_size, record
from fleet.errors import ConfigError
from fleet.exits.calibration import answer_losses, calibrate
from fleet.exits.records import Records
from fleet.exits.thresholds import OFF, evaluate_thresholds
from fleet.protocol.modes import CLOUD
from fleet.protocol.prompt import PromptRequest
from fleet.utils.prompt_file import PromptFile
from onnx_export.bundle import export_bundle
from onnx_export.config import ExportConfig
from onnx_export.training.config import TrainConfig
from onnx_export.training.train import train_heads
from tests.conftest import MakeTinyBundle
from tests.system.memory_fleet import memory_fleet

EXITS = (1, 3)
TARGET = 0.9


def prompts(first: int, count: int) -> list[str]:
    """Prompts of a few numbers, all different."""
    return [f"{i * 7919 % 10_007} {i * 104_729 % 9973} {i}" for i in range(first, first + count)]


def test_little_memory_records_fewer_answers_at_once(tiny_bundle: Bundle) -> None:
    manifest = tiny_bundle.manifest
    halves = 2 * sum(file.num_bytes for file in manifest.files)
    answer = 100 * 2 * 4 * 2 * 16 * 4  # positions, keys and values, layers, heads, float32
    assert batch_size(manifest, 100, None) == batch_size(manifest, 100, halves + 99 * answer) == 32
    assert batch_size(manifest, 100, halves + 5 * answer) == 5
    assert batch_size(manifest, 100, 0) == 1
    ids = [[5, 6, 7], [8, 9], [10], [11, 12]]
    whole, halved = (
        ExitRecorder(tiny_bundle, 4, num_threads=1, memory=memory).record(ids, lambda _: None)
        for memory in (None, 0)
    )
    np.testing.assert_allclose(whole.confidence, halved.confidence, rtol=1e-4)
    np.testing.assert_array_equal(whole.answer, halved.answer)


@pytest.fixture(scope="module")
def trained(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny model with heads that were trained on what it draws and says."""
    folder = tmp_path_factory.mktemp("trained")
    heads = folder / "heads.safetensors"
    train_heads(
        TrainConfig(
            exits=EXITS,
            out=heads,
            cache=folder / "cache",
            model=str(tiny_checkpoint),
            tokens=4000,
            max_new_tokens=24,
            batch=96,
        )
    )
    export_bundle(
        ExportConfig(
            out=folder / "bundle",
            exits=EXITS,
            model=str(tiny_checkpoint),
            heads=heads,
            quantization="fp32",
        )
    )
    return Bundle.load(folder / "bundle")


@pytest.fixture(scope="module")
def seen(trained: Bundle) -> Records:
    """Records of the exits on the calibration prompts."""
    return record(trained, prompts(0, 250), 16, 1)


def test_the_promise_holds_on_fresh_prompts(trained: Bundle, seen: Records) -> None:
    thresholds, calibration = calibrate(seen, TARGET, 0.9)
    fresh = record(trained, prompts(1000, 250), 16, 1)
    assert 1 - answer_losses(fresh, thresholds).mean() >= TARGET
    assert evaluate_thresholds(fresh, thresholds).offload_rate < 1.0
    assert calibration.num_answers == 250
    assert calibration.num_tokens == len(seen)


def test_a_recording_is_what_the_parts_say_one_by_one(trained: Bundle, seen: Records) -> None:
    again = record(trained, prompts(0, 3), 16, 1)
    some = seen.select(np.arange(3))
    np.testing.assert_array_equal(again.agrees, some.agrees)
    np.testing.assert_allclose(again.confidence, some.confidence, atol=1e-5)


def test_a_calibrated_copy_shares_files_and_has_an_id_of_its_own(
    trained: Bundle, seen: Records, tmp_path: Path
) -> None:
    thresholds, calibration = calibrate(seen, TARGET, 0.9)
    manifest = write_calibrated(trained, thresholds, calibration, tmp_path / "copy")
    copy = Bundle.load(tmp_path / "copy")
    assert copy.manifest == manifest
    assert copy.manifest.bundle_id != trained.manifest.bundle_id
    assert Bundle.load(trained.folder).manifest == trained.manifest
    with pytest.raises(ConfigError, match="is not an empty folder"):
        write_calibrated(trained, thresholds, calibration, tmp_path / "copy")
    keep_calibration(manifest, tmp_path / "kept.json")
    kept = read_calibration(tmp_path / "kept.json")
    assert kept.thresholds == thresholds
    assert kept.fits(EXITS, "fp32", trained.manifest.heads_sha256)
    assert not kept.fits((1, 2), "fp32", trained.manifest.heads_sha256)
    assert not kept.fits(EXITS, "int8", trained.manifest.heads_sha256)


def test_a_kept_calibration_is_for_its_own_heads_only(
    trained: Bundle, seen: Records, tiny_checkpoint: Path, tiny_heads: Path, tmp_path: Path
) -> None:
    manifest = write_calibrated(trained, *calibrate(seen, TARGET, 0.9), tmp_path / "copy")
    keep_calibration(manifest, tmp_path / "kept.json")
    config = ExportConfig(
        out=tmp_path / "other",
        exits=EXITS,
        model=str(tiny_checkpoint),
        heads=tiny_heads,
        quantization="fp32",
        calibration=tmp_path / "kept.json",
    )
    with pytest.raises(ConfigError, match="calibrate the new bundle"):
        export_bundle(config)
    assert not (tmp_path / "other").exists()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fleet.cli", "heads", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_evaluate_prints_what_scripts_read(trained: Bundle, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in prompts(50, 5))
    )
    files = "--bundle", str(trained.folder), "--prompts", str(tmp_path / "prompts.jsonl")
    kept = "--records", str(tmp_path / "records.npz")
    result = run("evaluate", *files, *kept, "--max-new-tokens", "8", "--json")
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    assert set(found) == {"tokens", "exits", "curve", "at", "deployed"}
    assert set(found["exits"]) == {"1", "3"}
    assert set(found["exits"]["1"]) == {"agreement", "ece"}
    assert set(found["at"]) == {"0.98", "0.95", "0.90"}
    assert all(
        set(point) == {"agreement", "offload_rate", "thresholds"} for point in found["curve"]
    )
    again = run("evaluate", "--bundle", str(trained.folder), *kept, "--json")
    assert json.loads(again.stdout) == found


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("evaluate",), ("no prompts", "--prompts FILE")),
        (
            ("evaluate", "--prompts", "/no/such/file"),
            ("cannot read /no/such/file", "give a file of prompts"),
        ),
        (("calibrate", "--prompts", "FEW"), ("2 answers are too few", "are needed")),
        (("calibrate", "--prompts", "FEW", "--target-agreement", "1.5"), ("target agreement 1.5",)),
        (
            ("calibrate", "--prompts", "FEW", "--write", "/no/such/folder/x.json"),
            ("--write /no/such", "that exists"),
        ),
        (("calibrate", "--prompts", "FEW", "--out", "/usr"), ("not an empty folder",)),
        (
            ("evaluate", "--prompts", "FEW", "--plot", "/no/such/folder/x.svg"),
            ("--plot /no/such", "that exists"),
        ),
    ],
)
def test_bad_input_is_one_clear_line(
    trained: Bundle, tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    few = tmp_path / "few.txt"
    few.write_text("one two three\nfour five six\n")
    before = (trained.folder / "manifest.json").read_bytes()
    given = [str(few) if argument == "FEW" else argument for argument in arguments]
    result = run(*given, "--bundle", str(trained.folder), "--max-new-tokens", "4")
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert "answering" not in result.stderr
    assert all(word in result.stderr.replace("\n", " ") for word in words), result.stderr
    assert (trained.folder / "manifest.json").read_bytes() == before


def test_a_device_uses_the_calibrated_thresholds_unless_told_otherwise(
    trained: Bundle, seen: Records, tmp_path: Path
) -> None:
    thresholds, calibration = calibrate(seen, TARGET, 0.9)
    write_calibrated(trained, thresholds, calibration, tmp_path / "copy")
    bundle = Bundle.load(tmp_path / "copy")
    asked = [PromptRequest(prompt=text, max_new_tokens=16) for text in prompts(2000, 12)]

    def sources(config: AgentConfig, **override: Any) -> list[list[str | None]]:
        with memory_fleet() as fleet:
            fleet.start_worker(bundle)
            fleet.start_device(bundle, config)
            answers = [fleet.ask(msgspec.structs.replace(request, **override)) for request in asked]
        return [
            [reply.source for reply in answer.replies if reply.token_id is not None]
            for answer in answers
        ]

    plain = AgentConfig(num_threads=1)
    calibrated = sources(plain)
    assert {source for answer in calibrated for source in answer} > {CLOUD}
    assert calibrated == sources(plain, thresholds=thresholds)
    assert {source for answer in sources(plain, threshold=1.0) for source in answer} == {CLOUD}
    never = AgentConfig(num_threads=1, thresholds=(OFF, OFF))
    assert {source for answer in sources(never) for source in answer} == {CLOUD}
    assert sources(never, thresholds=thresholds) == calibrated


def test_a_recording_serves_its_own_bundle_and_prompts_only(
    trained: Bundle, make_tiny_bundle: MakeTinyBundle, tmp_path: Path
) -> None:
    first = tmp_path / "first.txt"
    other = tmp_path / "other.txt"
    kept = tmp_path / "records.npz"
    first.write_text("\n".join(prompts(0, 6)))
    other.write_text("\n".join(prompts(10, 6)))
    first_file = PromptFile.read(first)
    other_file = PromptFile.read(other)
    recording = load_or_record(trained, [first_file], 8, kept)
    again = load_or_record(trained, [first_file], 8, kept)
    np.testing.assert_array_equal(again.records.confidence, recording.records.confidence)
    assert load_or_record(trained, [], 64, kept).prompts_sha256 == (hash_file(first),)
    calibrated = Bundle(
        trained.folder, msgspec.structs.replace(trained.manifest, thresholds=(0.5, 0.5))
    )
    assert load_or_record(calibrated, [first_file], 8, kept).num_prompts == 6
    for files, length, limit in (
        ([other_file], 8, None),
        ([first_file], 9, None),
        ([first_file], 8, 3),
        ([first_file, other_file], 8, None),
    ):
        with pytest.raises(ConfigError, match="recorded with other prompts"):
            load_or_record(trained, files, length, kept, limit)
    with pytest.raises(ConfigError, match="recorded with another bundle"):
        load_or_record(make_tiny_bundle(EXITS), [first_file], 8, kept)


def test_a_recording_is_kept_in_the_cache_and_read_again(
    trained: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "few.txt"
    file.write_text("\n".join(prompts(0, 3)))
    read = PromptFile.read(file)
    path = cached_recording(trained, [read], 4)
    assert path is not None
    assert path.is_relative_to(tmp_path / "cache")
    assert cached_recording(trained, [read], 5) != path != cached_recording(trained, [read], 4, 2)
    files = ("--bundle", str(trained.folder), "--prompts", str(file), "--max-new-tokens", "4")
    first = run("evaluate", *files)
    assert "answering: 0 of 3" in first.stderr
    assert f"kept in {path}" in first.stderr
    again = run("evaluate", *files)
    assert "answering" not in again.stderr
    assert again.stdout == first.stdout != ""


def test_the_batch_changes_nothing_when_answers_wait_for_a_place(
    trained: Bundle, seen: Records
) -> None:
    alone = [record(trained, [text], 16, 1) for text in prompts(60, 3)]
    for number, single in enumerate(alone, 60):
        together = seen.select(np.array([number]))
        np.testing.assert_array_equal(single.agrees, together.agrees)
        np.testing.assert_allclose(single.confidence, together.confidence, atol=1e-5)


def test_a_copy_that_cannot_be_written_is_one_line_and_leaves_nothing(
    trained: Bundle, seen: Records, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    before = (trained.folder / "manifest.json").read_bytes()
    with pytest.raises(ConfigError, match="cannot write the calibrated bundle"):
        write_calibrated(trained, *calibrate(seen, TARGET, 0.9), tmp_path / "file" / "copy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    assert (trained.folder / "manifest.json").read_bytes() == before


def test_thresholds_that_are_off_leave_every_token_to_the_cloud(seen: Records) -> None:
    assert evaluate_thresholds(seen, (OFF, OFF)).offload_rate == 1.0
