"""`fleet bench plan`: rows of a tiny model, and its arguments."""

from __future__ import annotations

import pytest

from benchmarks.plan import SplitEngines, app, chosen_splits, measure_splits
from cloud_broker_worker.worker.upper_layers import UpperLayers
from fleet.bundles.manifest import Bundle
from fleet.errors import ConfigError
from fleet.graphs.partition import Partition


def test_rows_compare_each_split_and_only_the_middle_is_fitted(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.plan.STEPS", 2)
    partition = Partition(tiny_bundle, num_threads=1)
    upper = UpperLayers(tiny_bundle, 1)
    engines = [
        SplitEngines(layer=0, partition=None, upper=upper),
        SplitEngines(layer=1, partition=partition, upper=upper),
        SplitEngines(layer=2, partition=partition, upper=upper),
        SplitEngines(layer=3, partition=partition, upper=upper),
        SplitEngines(layer=4, partition=partition, upper=None),
    ]
    device, worker, rows = measure_splits(engines, 1, "float32", lambda _: None)
    assert [(row.name, row.layers, row.is_held_back) for row in rows] == [
        ("cloud_only", 0, True),
        ("device", 1, True), ("worker", 1, True), ("verified", 1, True),
        ("device", 2, False), ("worker", 2, False), ("verified", 2, True),
        ("device", 3, True), ("worker", 3, True), ("verified", 3, True),
        ("on_device", 4, True),
    ]  # fmt: skip
    by_name = {(row.name, row.layers): row for row in rows}
    fitted = by_name["device", 2]
    assert fitted.predicted_ms == pytest.approx(fitted.measured_ms)
    verified = by_name["verified", 3]
    assert verified.predicted_ms == pytest.approx(device.step_ms(3) + worker.step_ms(1))
    assert verified.error == pytest.approx(verified.predicted_ms / verified.measured_ms - 1)


@pytest.mark.parametrize(
    ("text", "shape", "splits"),
    [
        (None, "default", (8, 15, 24)),
        (None, "0.5b", (6, 12, 18)),
        ("2,3,7", "0.5b", (2, 3, 7)),
    ],
)
def test_splits_are_three(text: str | None, shape: str, splits: tuple[int, ...]) -> None:
    assert chosen_splits(text, shape) == splits


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shape", "9b"), "unknown shape '9b': expected one of default, 0.5b"),
        (("--shape", "0.5b", "--splits", "3,6"), "--splits 3,6: expected three layers below 24"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        app(args=list(arguments), standalone_mode=False)
