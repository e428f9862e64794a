"""The options of the workers that `fleet up` starts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cloud_broker_worker.worker.config import MEASURED, check_weight_format, default_weights
from fleet.bundles.manifest import Bundle
from fleet.errors import BundleError, ConfigError
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


def test_the_fastest_weights_that_agree_are_the_default_of_a_measured_model() -> None:
    assert default_weights("SmolLM2-135M-Instruct", "F32") == "int4"
    assert default_weights("SmolLM2-135M-Instruct", "BF16") == "int4"


@pytest.mark.parametrize(
    ("stored", "weights"),
    [(torch.float32, "float32"), (torch.bfloat16, "bfloat16"), (torch.float16, "bfloat16")],
)
def test_another_model_has_weights_of_the_size_that_the_bundle_stores(
    stored: torch.dtype, weights: str, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_bundle.folder, tmp_path / "bundle")
    path = folder / "cloud/model.safetensors"
    save_file({name: tensor.to(stored) for name, tensor in load_file(path).items()}, path)
    assert WorkerSettings().arguments(folder, 1)[-2:] == ["--weights", weights]


def test_a_bundle_without_readable_layers_is_refused_in_one_line(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_bundle.folder, tmp_path / "bundle")
    (folder / "cloud/model.safetensors").write_bytes(b"none")
    with pytest.raises(BundleError, match=r"cannot be read: .*; export the bundle again") as error:
        WorkerSettings().arguments(folder, 1)
    assert "\n" not in str(error.value)


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
    with pytest.raises(
        ConfigError, match="--weights int2: expected one of float32, bfloat16, int8, int4"
    ):
        check_weight_format("int2")
