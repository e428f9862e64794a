"""Splits of a bundle between two machines, as tables: steps, round trips, memory and agreement."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from fleet.bundles.manifest import FileEntry, Manifest, ModelInfo
from fleet.errors import ConfigError
from fleet.exits.calibration import Calibration, CurvePoint, ExitCalibration
from fleet.planning.advice import plan_deployment
from fleet.planning.cost_model import Expectation, PlanRequest, expectations, read_fits
from fleet.planning.machine_speeds import (
    MachineSpeeds,
    read_speeds,
    report_speeds,
    write_speeds,
)
from fleet.planning.splits import (
    AT_MOST,
    INTERPOLATED,
    MEASURED,
    NOT_MEASURED,
    accepted_below,
    exit_agreement,
    split_fits,
    whole_agreement,
    whole_model,
    worker_speeds,
)

FITTED = read_fits()[0]
MODEL = ModelInfo(
    name="SmolLM2-135M-Instruct",
    architecture="LlamaForCausalLM",
    num_layers=30,
    hidden_size=576,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_positions=8192,
    eos_token_ids=(2,),
)


def calibration(**agreements: float) -> Calibration:
    """Return a calibration in which exit i emits a fifth of the tokens, for exits `e8=0.4`."""
    exits = {
        name[1:]: ExitCalibration(
            agreement=agreement, ece=0.1, scaled_ece=0.1, slope=1.0, intercept=0.0
        )
        for name, agreement in agreements.items()
    }
    shares = (0.2,) * len(exits)
    point = CurvePoint((0.8,) * len(exits), shares, 0.98, 1 - sum(shares))
    return Calibration(
        method="test",
        target_agreement=0.98,
        confidence=0.95,
        num_answers=100,
        num_tokens=1000,
        prompts_sha256=(),
        exits=exits,
        curve=(point, CurvePoint((0.1,) * len(exits), (0.5,) * len(exits), 0.7, 0.0)),
    )


def manifest(exits: tuple[int, ...] = (8, 15, 24), **changes: object) -> Manifest:
    """Return a bundle of three blocks: 1 MB a layer, 70 MB of tables."""
    blocks = [
        FileEntry(f"edge/block_{i}.onnx.data", 1_000_000 * (stop - start), "0" * 64)
        for i, (start, stop) in enumerate(zip((0, *exits[:-1]), exits, strict=True))
    ]
    tables = [
        FileEntry("edge/embedding.npy", 55_000_000, "0" * 64),
        FileEntry("edge/lm_head.onnx", 15_000_000, "0" * 64),
        FileEntry("cloud/model.safetensors", 200_000_000, "0" * 64),
    ]
    values = {
        "schema_version": 4,
        "model": MODEL,
        "exits": exits,
        "split_layer": exits[-1],
        "upload_layer": exits[0],
        "uploads": tuple(layer for layer in exits if layer < MODEL.num_layers) or exits,
        "quantization": "balanced",
        "top_k": 64,
        "thresholds": (0.8,) * len(exits),
        "parity": {},
        "tools": {},
        "files": (*blocks, *tables),
    }
    return Manifest(**(values | changes))  # type: ignore[arg-type]


# A layer is 1 ms on the device and 2 ms on the worker, a head 10 ms on either.
DEVICE = MachineSpeeds(
    side="device",
    model=MODEL.name,
    weights="balanced",
    processor="p",
    num_threads=1,
    layer_ms=1.0,
    head_ms=10.0,
    prompt_layer_ms=0.1,
)
WORKER = msgspec.structs.replace(DEVICE, side="worker", weights="float32", layer_ms=2.0)
NO_MESSAGES = msgspec.structs.replace(
    FITTED,
    edge=msgspec.structs.replace(FITTED.edge, message_steps=0.0),
    cloud=msgspec.structs.replace(FITTED.cloud, message_steps=0.0),
)
LINK = PlanRequest(rtt_ms=20.0, mbit_s=1e6, prompt_tokens=1, tokens=100)


def by_name(of: Manifest, request: PlanRequest = LINK) -> dict[tuple[str, int], Expectation]:
    fits = split_fits(of, DEVICE, WORKER, NO_MESSAGES)
    return {(one.name, one.split_layer): one for one in expectations(fits, request)}


@pytest.mark.parametrize(
    ("name", "layer", "edge_ms", "cloud_ms"),
    [
        ("standalone", 8, 8 + 1 * 10, 0),
        ("standalone", 15, 15 + 2 * 10, 0),  # each exit may be evaluated
        ("standalone", 24, 24 + 3 * 10, 0),
        ("verified", 8, 8 + 1 * 10, 22 * 2 + 10),
        ("verified", 24, 24 + 3 * 10, 6 * 2 + 10),
        ("on_device", 30, 30 + 10, 0),
        ("cloud_only", 24, 0, 30 * 2 + 10),
    ],
)
def test_a_token_takes_the_layers_and_heads_of_either_side(
    name: str, layer: int, edge_ms: float, cloud_ms: float
) -> None:
    found = by_name(manifest())[name, layer]
    prompt_ms = 0.1 * layer if name != "cloud_only" else 0
    prompt_cloud_ms = 0.1 * (30 - layer) if name == "verified" else 3 if cloud_ms == 70 else 0
    assert found.edge_ms == pytest.approx(100 * edge_ms + prompt_ms)
    assert found.cloud_ms == pytest.approx(100 * cloud_ms + prompt_cloud_ms)


@pytest.mark.parametrize(
    ("thresholds", "num_heads"),
    [((1.0, 1.0, 1.0), 1), ((1.0, 0.8, 1.0), 2), ((0.8, 0.8, 1.0), 3)],
)
def test_an_exit_that_is_off_takes_no_time_unless_it_is_the_last(
    thresholds: tuple[float, ...], num_heads: int
) -> None:
    alone = by_name(manifest(thresholds=thresholds))["standalone", 24]
    assert alone.edge_ms == pytest.approx(100 * (24 + 10 * num_heads) + 2.4)


def test_the_worker_runs_the_layers_above_the_deepest_upload_layer() -> None:
    found = by_name(manifest(uploads=(8, 24)))
    layers = {layer: found["verified", layer].cloud_ms for layer in (8, 15, 24)}
    steps = {layer: 100 * (2 * (30 - upload) + 10) + 0.1 * (30 - upload)
             for layer, upload in ((8, 8), (15, 8), (24, 24))}  # fmt: skip
    assert layers == pytest.approx(steps)
    late = by_name(manifest(upload_layer=15, uploads=(15, 24)))
    assert {layer for name, layer in late if name == "verified"} == {15, 24}


def test_without_an_agreement_each_token_is_a_round_trip_at_most() -> None:
    found = by_name(manifest(thresholds=(1.0, 1.0, 1.0)))
    verified = found["verified", 15]
    assert (verified.basis, verified.agreement) == (AT_MOST, 1.0)
    assert verified.round_trips == pytest.approx(100)
    assert verified.total_ms == pytest.approx(
        verified.edge_ms + verified.cloud_ms + 100 * 20, rel=1e-3
    )
    alone = found["standalone", 15]
    assert (alone.basis, alone.agreement) == (NOT_MEASURED, None)
    assert not any(name.startswith("collaborative") for name, _ in found)


def test_round_trips_lie_between_those_of_no_agreement_and_the_fitted_exits() -> None:
    counts = next(one for one in FITTED.settings if one.name == "verified").counts[0]
    fitted = 1 - counts.offload_rate
    calibrated = manifest(calibration=calibration(e8=0.0, e15=fitted / 2, e24=fitted))
    found = by_name(calibrated, msgspec.structs.replace(LINK, rtt_ms=0.0))
    measured = counts.round_trips
    trips = [found["verified", layer].round_trips for layer in (8, 15, 24)]
    assert trips == pytest.approx([100, 100 * (1 + measured) / 2, 100 * measured])
    shares = [found["verified", layer].offload_rate for layer in (8, 15, 24)]
    assert shares == pytest.approx([1, 1 - fitted / 2, 1 - fitted])
    assert [found["verified", layer].basis for layer in (8, 15, 24)] == [
        INTERPOLATED,
        INTERPOLATED,
        MEASURED,
    ]


def test_drafts_below_the_threshold_are_accepted_less_often() -> None:
    assert accepted_below(0.6, 0.5) == pytest.approx(0.2)
    assert accepted_below(0.4, 0.5) == 0.0
    assert accepted_below(0.6, 1.0) == 0.6
    assert accepted_below(1.0, 0.0) == 0.0
    found = by_name(manifest(calibration=calibration(e8=0.2, e15=0.5, e24=0.7)))
    # No draft of exit 8 is accepted beyond the fifth of the tokens that it emits.
    assert found["collaborative", 8].round_trips == pytest.approx(80)
    assert found["verified", 8].round_trips < 100


def test_exits_of_a_split_emit_the_share_that_they_were_calibrated_with() -> None:
    found = by_name(manifest(calibration=calibration(e8=0.4, e15=0.5, e24=0.7)))
    shares = [found["collaborative", layer].offload_rate for layer in (8, 15, 24)]
    assert shares == pytest.approx([0.8, 0.6, 0.4])
    # The second exit is evaluated for four fifths of the tokens, the third for three fifths.
    assert found["standalone", 24].edge_ms == pytest.approx(100 * (24 + 10 * 2.4) + 2.4)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (15, (0.5, MEASURED)),
        (24, (0.8, MEASURED)),
        (5, (0.5 / 3, INTERPOLATED)),
        (27, (0.9, INTERPOLATED)),
    ],
)
def test_the_agreement_of_another_exit_is_interpolated(
    layer: int, expected: tuple[float, str]
) -> None:
    of = manifest((15, 24), calibration=calibration(e15=0.5, e24=0.8), thresholds=(0.8, 0.8))
    agreement, basis = exit_agreement(of, layer)
    assert agreement == pytest.approx(expected[0])
    assert basis == expected[1]
    assert exit_agreement(manifest(), layer) == (None, NOT_MEASURED)


@pytest.mark.parametrize(
    ("changes", "agreement"),
    [
        ({}, 0.9755),
        ({"quantization": "fp32"}, 1.0),
        ({"quantization": "q5"}, None),
        ({"quantization": "q5", "parity": {"same_as_pytorch.30": 0.97}}, 0.97),
    ],
)
def test_the_agreement_of_the_whole_model_is_that_of_its_preset(
    changes: dict[str, object], agreement: float | None
) -> None:
    assert whole_agreement(manifest((8, 15, 24), **changes)) == agreement


def test_memory_is_that_of_the_layers_the_tables_and_the_caches() -> None:
    whole = whole_model(manifest(), 10.0)
    caches = 2 * 3 * 64 * 4 * 100 / 1e6
    assert whole.memory_mb(30, 100) == pytest.approx(70 + 30 + 30 * caches)
    assert whole.memory_mb(8, 100) == pytest.approx(70 + 8 + 8 * caches)


@pytest.mark.parametrize(
    ("memory_mb", "layers"),
    [(None, {8, 15, 24, 30}), (96, {8, 15}), (79.5, {8}), (10, set())],
)
def test_only_splits_that_the_device_has_room_for_are_compared(
    memory_mb: float | None, layers: set[int]
) -> None:
    request = msgspec.structs.replace(LINK, device_memory_mb=memory_mb)
    found = by_name(manifest(), request)
    assert {layer for name, layer in found if name != "cloud_only"} == layers
    assert any(name == "cloud_only" for name, _ in found)


def test_a_bundle_without_a_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no split; give a bundle with an earlier upload"):
        split_fits(manifest((30,)), DEVICE, WORKER, FITTED)


def test_the_advice_is_the_whole_model_on_a_device_that_holds_it() -> None:
    fits = split_fits(manifest(), DEVICE, WORKER, FITTED)
    plan = plan_deployment(fits, msgspec.structs.replace(LINK, mbit_s=31.0, min_agreement=0.95))
    assert plan.best == "on_device"
    assert "a split is the wrong choice here: the fastest, verified with exits" in plan.advice


def test_a_slow_device_and_a_fast_worker_are_advised_to_split() -> None:
    slow = msgspec.structs.replace(DEVICE, layer_ms=20.0, prompt_layer_ms=5.0)
    fast = msgspec.structs.replace(WORKER, layer_ms=0.05, head_ms=0.5, prompt_layer_ms=0.01)
    calibrated = manifest(calibration=calibration(e8=0.6, e15=0.65, e24=0.7))
    fits = split_fits(calibrated, slow, fast, FITTED)
    request = PlanRequest(rtt_ms=300.0, mbit_s=31.0, min_agreement=0.98, tokens=100)
    plan = plan_deployment(fits, request)
    assert plan.best == "cloud_only"
    without_cloud = tuple(
        msgspec.structs.replace(
            fit, settings=tuple(one for one in fit.settings if one.mode != "cloud_only")
        )
        for fit in fits
    )
    assert plan_deployment(without_cloud, request).best == "collaborative with exits 8"
    one_split = plan_deployment(without_cloud[-1:], request)
    assert "Only exits 8 were compared; a bundle with more exits has more splits." in (
        one_split.advice
    )


def test_the_fitted_worker_serves_its_own_model_only() -> None:
    speeds = worker_speeds(FITTED, manifest())
    assert speeds.step_ms(30) == pytest.approx(FITTED.cloud.step_ms)
    other = manifest(model=msgspec.structs.replace(MODEL, name="other"))
    with pytest.raises(ConfigError, match="no worker was measured with other; measure one"):
        worker_speeds(FITTED, other)


def test_speeds_survive_their_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "device.json"
    report_speeds(DEVICE, path, as_json=False)
    assert "for 'fleet plan --machine'" in capsys.readouterr().out
    assert read_speeds(path, "device", manifest()) == DEVICE
    with pytest.raises(ConfigError, match="choose another --out"):
        write_speeds(DEVICE, tmp_path / "no" / "device.json")


@pytest.mark.parametrize(
    ("speeds", "words"),
    [
        (WORKER, "expected speeds of a device, got a worker's; make it on the machine with"),
        (
            msgspec.structs.replace(DEVICE, weights="int8"),
            "expected the speeds of SmolLM2-135M-Instruct balanced, got SmolLM2-135M-Instruct int8",
        ),
        (msgspec.structs.replace(DEVICE, layer_ms=0.0), "is not usable"),
    ],
)
def test_speeds_of_another_machine_or_model_are_refused(
    tmp_path: Path, speeds: MachineSpeeds, words: str
) -> None:
    path = tmp_path / "device.json"
    write_speeds(speeds, path)
    with pytest.raises(ConfigError, match=words):
        read_speeds(path, "device", manifest())


def test_the_shipped_fit_says_that_the_default_model_belongs_on_the_device() -> None:
    request = PlanRequest(rtt_ms=20.0, mbit_s=31.0, min_agreement=0.95)
    plan = plan_deployment((FITTED,), request)
    assert plan.best == "on_device"
    assert "The whole model belongs on the device; a split is the wrong choice" in plan.advice
    exact = plan_deployment((FITTED,), msgspec.structs.replace(request, min_agreement=0.98))
    assert "would take 0.45 s, but agrees only to 0.976." in exact.advice
    small = plan_deployment((FITTED,), msgspec.structs.replace(request, device_memory_mb=150.0))
    assert "but needs 155 MB there, of 150 MB." in small.advice
