"""The options of the workers that `fleet up` starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloud_broker_worker.worker.config import check_weight_format
from fleet.errors import ConfigError
from fleet.server.worker_settings import WorkerSettings, threads_per_worker


def test_settings_become_options_of_each_worker() -> None:
    folder = Path("bundle")
    bundle = ["--bundle", "bundle"]
    assert WorkerSettings().arguments(folder, 1) == bundle
    shared = ["--threads", threads_per_worker(2)]
    assert WorkerSettings().arguments(folder, 2) == [*bundle, *shared]
    settings = WorkerSettings(weights="int8", expected_sessions=9, kv_budget_mb=200, threads=3)
    weights = ["--weights", "int8", "--expected-sessions", "9"]
    options = [*weights, "--kv-budget-mb", "200", "--threads", "3"]
    assert settings.arguments(folder, 2) == [*bundle, *options]


def test_unknown_weights_are_refused_with_those_that_there_are() -> None:
    check_weight_format("auto")
    with pytest.raises(
        ConfigError, match="--weights int2: expected one of auto, float32, bfloat16, int8, int4"
    ):
        check_weight_format("int2")
