"""The benchmark of the export, with a toy shape and both halves in this process."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Final

import pytest
from rich.console import Console

from benchmarks.drivers.export import check_memory, export_config, export_shape
from benchmarks.export import (
    DEVICE_CONFIG,
    NUM_TOKENS,
    PROMPT,
    RunningHalves,
    VerifyTimes,
    half_sizes,
    mean_ms,
    measure_halves,
    print_result,
    scrape_verify_times,
)
from benchmarks.random_model import SHAPES, ModelShape, byte_tokenizer, random_model
from cloud_broker_worker.worker.config import WorkerConfig
from cloud_broker_worker.worker.metrics import WorkerMonitor
from fleet.bundles.manifest import Bundle
from fleet.errors import FleetError
from fleet.monitoring.http_endpoint import HttpEndpoint
from fleet.protocol.modes import Mode
from onnx_export.streamed_model import FINAL_NORM, make_skeleton
from onnx_export.weights import EMBEDDING
from tests.system.memory_fleet import memory_fleet

TOY: Final = ModelShape(
    num_layers=4,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=384,
    is_tied=True,
)
NUM_PARAMETERS: Final = {
    "0.5b": 494_032_768,
    "1.1b": 1_100_048_384,
    "3b": 3_212_749_824,
    "7b": 6_738_415_616,
}
FIELDS: Final = {
    "peak_rss_mb",
    "cpu_seconds",
    "edge_mb",
    "cloud_mb",
    "device_rss_mb",
    "worker_rss_mb",
    "device_peak_rss_mb",
    "worker_peak_rss_mb",
    "device_step_ms",
    "worker_step_ms",
}


def test_a_random_model_is_exported_and_its_halves_answer_in_both_modes(tmp_path: Path) -> None:
    config = export_config("toy", (2,), "balanced", tmp_path / "bundle", tmp_path / "graphs")
    figures = export_shape(TOY, config, seed=0) | half_sizes(config.out)
    bundle = Bundle.load(config.out)
    lines: list[str] = []
    with memory_fleet() as fleet, HttpEndpoint("127.0.0.1", 0) as endpoint:
        worker, _ = fleet.start_worker(bundle, WorkerConfig(num_threads=1, weights="bfloat16"))
        endpoint.show(WorkerMonitor(worker))
        fleet.start_device(bundle, DEVICE_CONFIG)
        halves = RunningHalves(
            client=fleet.client,
            device_pid=os.getpid(),
            worker_pid=os.getpid(),
            verify_times=lambda: scrape_verify_times(endpoint.url),
        )
        figures |= measure_halves(halves, lines.append)
        assert scrape_verify_times(endpoint.url).num_responses > NUM_TOKENS // 2
    assert figures.keys() == FIELDS
    assert all(value > 0 for value in figures.values())
    assert [line.rpartition(" ")[2] for line in lines] == [
        Mode.COLLABORATIVE,
        Mode.VERIFIED,
        Mode.STANDALONE,
    ]
    text = io.StringIO()
    result = {"shape": "toy", "exits": (1, 3), "quantization": "balanced", **figures}
    print_result(Console(file=text, width=100), result | {"seconds": 1234.0})
    assert "exits 1,3" in text.getvalue()
    assert "1,234" in text.getvalue()


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_published_number_of_parameters(name: str) -> None:
    skeleton = make_skeleton(SHAPES[name].config())
    assert sum(weight.numel() for weight in skeleton.parameters()) == NUM_PARAMETERS[name]


def test_the_final_norm_makes_up_for_the_scale_of_a_tied_embedding(tmp_path: Path) -> None:
    config = export_config("toy", (2,), "balanced", tmp_path / "bundle", tmp_path / "graphs")
    model, _ = random_model(TOY, 0)(config, lambda _: None)
    scale = model.read(EMBEDDING).float().std() * model.read(FINAL_NORM).float().mean()
    assert float(scale) == pytest.approx(TOY.hidden_size**-0.5, rel=0.05)


def test_the_prompt_has_16_tokens() -> None:
    tokenizer = byte_tokenizer(TOY.vocab_size)
    assert len(tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}])) == 16
    assert len(tokenizer) == TOY.vocab_size


def test_halves_that_do_not_fit_the_memory_are_refused_before_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = export_config("toy", (2,), "balanced", tmp_path / "bundle", tmp_path / "graphs")
    model, _ = random_model(TOY, 0)(config, lambda _: None)
    check_memory(config, model)
    monkeypatch.setattr("benchmarks.drivers.export.free_memory", lambda: 1000)
    with pytest.raises(FleetError, match=r"the halves need about .* choose a smaller --shape"):
        export_shape(TOY, config, seed=0)
    assert not config.out.exists()


def test_a_worker_that_was_asked_nothing_has_no_time() -> None:
    assert mean_ms(VerifyTimes(1, 0.5), VerifyTimes(3, 1.5)) == 500
    with pytest.raises(FleetError, match="the worker had no verify request"):
        mean_ms(VerifyTimes(1, 0.5), VerifyTimes(1, 0.5))
