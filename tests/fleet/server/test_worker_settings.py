"""The options of the workers that `fleet up` starts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cloud_broker_worker.worker.config import MEASURED, check_weight_format, default_weights
from fleet.bundles.manifest import Bundle
from fleet.errors import ConfigError
from fleet.server.worker_settings import WorkerSettings, threads_per_worker

DOCUMENT = Path(__file__).parents[3] / "docs" / "worker.md"


def test_the_table_of_weights_is_the_documents() -> None:
    text = DOCUMENT.read_text()
    agreements = dict(re.findall(r"^\| `(\w+)` \| (\d\.\d+) \|", text, re.MULTILINE))
    times = dict(re.findall(r"^\| `(\w+)` \| (\d+\.\d) ms", text, re.MULTILINE))
    (measured,) = MEASURED.values()
    assert {each.weights: each.agreement for each in measured} == {
        name: float(agreement) for name, agreement in agreements.items()
    }
    assert {each.weights: each.position_ms for each in measured} == {
        name: float(ms) for name, ms in times.items()
    }


def test_the_fastest_weights_that_agree_are_the_default_and_float32_where_none_is_measured() -> (
    None
):
    assert default_weights("SmolLM2-135M-Instruct") == "int4"
    assert default_weights("another-model") == "float32"


def test_settings_become_options_of_each_worker(tiny_bundle: Bundle) -> None:
    folder = tiny_bundle.folder
    bundle = ["--bundle", str(folder)]
    assert WorkerSettings().arguments(folder, 1) == [*bundle, "--weights", "float32"]
    shared = ["--threads", threads_per_worker(2)]
    assert WorkerSettings().arguments(folder, 2) == [*bundle, "--weights", "float32", *shared]
    settings = WorkerSettings(weights="int8", kv_budget_mb=200, threads=3)
    options = ["--weights", "int8", "--kv-budget-mb", "200", "--threads", "3"]
    assert settings.arguments(folder, 2) == [*bundle, *options]


def test_unknown_weights_are_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="--weights int2: expected one of float32, int8, int4"):
        check_weight_format("int2")
