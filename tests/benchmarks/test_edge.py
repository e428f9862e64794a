"""The benchmark's own figures, on the tiny model."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import edge, engine_rounds
from benchmarks.breakdown import (
    graph_weight_bytes,
    operators_only,
    profile_chunks,
    profile_steps,
    read_bandwidth,
    step_times,
)
from benchmarks.edge import EdgeBench, cells, driver, parse_list, widest
from benchmarks.engine_rounds import speed_quartiles
from benchmarks.engines import EngineProcess
from benchmarks.fidelity import NEW_TOKENS, ReferenceAnswer, token_agreement
from benchmarks.graphs import EdgeGraphs
from benchmarks.plots import plot_engines
from fleet.bundles.instruction_sets import instruction_sets
from fleet.errors import ConfigError
from onnx_export.config import Quantization

NUM_LAYERS = 4


@pytest.fixture
def bench(tiny_graphs: EdgeGraphs, monkeypatch: pytest.MonkeyPatch) -> EdgeBench:
    monkeypatch.setattr(edge, "EXITS", (1, 2))
    monkeypatch.setattr(engine_rounds, "SPEED_TOKENS", 4)
    monkeypatch.setattr(edge, "PREFILLS", (8, 16))
    monkeypatch.setattr(engine_rounds, "PREFILL", 16)
    monkeypatch.setattr(edge, "THREADS", (1,))
    return EdgeBench(
        tiny_graphs, ("fp32", "int8"), rounds=2, with_peers=False, progress=lambda _: None
    )


def test_the_reference_is_greedy_and_long_enough(tiny_answers: list[ReferenceAnswer]) -> None:
    assert all(0 < len(answer.answer) <= NEW_TOKENS for answer in tiny_answers)
    assert sum(len(answer.answer) for answer in tiny_answers) > NEW_TOKENS


def test_the_whole_model_without_quantization_agrees_on_every_token(
    tiny_graphs: EdgeGraphs, tiny_answers: list[ReferenceAnswer]
) -> None:
    with EngineProcess("ours", driver(tiny_graphs.bundle(NUM_LAYERS, "fp32"), 1)) as engine:
        assert token_agreement(engine, tiny_answers) == 1.0


def test_agreement_is_the_share_of_all_answers_tokens(
    tiny_graphs: EdgeGraphs, tiny_answers: list[ReferenceAnswer]
) -> None:
    first, second = tiny_answers[:2]
    altered = [
        ReferenceAnswer(first.prompt, [*first.answer[:-1], (first.answer[-1] + 1) % 384]),
        second,
    ]
    total = len(first.answer) + len(second.answer)
    with EngineProcess("ours", driver(tiny_graphs.bundle(NUM_LAYERS, "fp32"), 1)) as engine:
        assert token_agreement(engine, altered) == pytest.approx((total - 1) / total)


def test_every_preset_has_a_row_with_its_speed_and_agreement(
    bench: EdgeBench, tiny_answers: list[ReferenceAnswer]
) -> None:
    rows = bench.engines(("speed", "prefill"), tiny_answers)
    assert [(row["engine"], row["preset"], row["threads"]) for row in rows] == [
        ("ours", "fp32", 1),
        ("ours", "int8", 1),
    ]
    assert rows[0]["agreement"] == 1.0
    assert 0.5 < rows[1]["agreement"] <= 1.0
    assert all(
        row["tokens_per_s_low"] <= row["tokens_per_s"] <= row["tokens_per_s_high"] for row in rows
    )
    for row in rows:
        assert set(row["prefill"]) == {"8", "16"}
        assert row["prefill_tokens_per_s"] == row["prefill"]["16"] > 0
        assert row["instruction_sets"] == list(instruction_sets())
    assert bench.versions["ours"].startswith("onnxruntime ")


def test_exits_are_compared_with_the_whole_model(
    bench: EdgeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge, "STEPS", 4)
    monkeypatch.setattr(edge, "DEFAULT_PRESET", "fp32")
    ratios = bench.exit_steps()
    assert list(ratios) == ["1", "2"]
    assert all(ratio > 0 for ratio in ratios.values())


def test_an_exit_below_the_last_layer_has_a_head_of_the_default_kind(
    tiny_graphs: EdgeGraphs,
) -> None:
    exit_bytes, whole_bytes = (
        graph_weight_bytes(tiny_graphs.bundle(layer, "fp32")) for layer in (1, NUM_LAYERS)
    )
    layer = 4 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3)
    assert exit_bytes - 4 * 64 * 64 == whole_bytes - (NUM_LAYERS - 1) * layer


def test_the_profile_names_what_a_step_is_made_of(tiny_graphs: EdgeGraphs) -> None:
    near, far = profile_steps(
        tiny_graphs.bundle(NUM_LAYERS, "balanced"), 1, positions=(16, 128)
    ).values()
    assert set(near) == set(far)
    assert {
        "products",
        "attention",
        "norms",
        "LM head",
        "small operators",
        "between operators",
        "outside",
    } == set(near)
    assert operators_only(near) < sum(near.values())


def test_the_profile_of_chunks_has_the_same_parts_for_each_size(tiny_graphs: EdgeGraphs) -> None:
    chunks = profile_chunks(tiny_graphs.bundle(NUM_LAYERS, "balanced"), 1, sizes=(1, 33))
    assert list(chunks) == [1, 33]
    assert {"products", "LM head", "small operators"} < set(chunks[1])
    assert set(chunks[1]) == set(chunks[33])
    assert operators_only(chunks[1]) < operators_only(chunks[33])


def test_a_steps_parts_are_medians_and_leave_out_what_ran_before() -> None:
    def node(name: str, start: int, duration: int) -> dict[str, Any]:
        return {
            "cat": "Node",
            "name": "x_kernel_time",
            "ts": start,
            "dur": duration,
            "args": {"op_name": name},
        }

    def run(start: int, duration: int) -> dict[str, Any]:
        return {"cat": "Session", "name": "model_run", "ts": start, "dur": duration, "args": {}}

    block = [node("MatMulNBits", 10, 900), run(0, 950)]
    for start, product in ((1000, 40), (2000, 50), (3000, 70)):
        block += [
            node("MatMulNBits", start + 1, product),
            node("Mul", start + 80, 5),
            run(start, 100),
        ]
    head = [
        part
        for start in (1200, 2200, 3200)
        for part in (node("MatMulNBits", start, 20), run(start, 25))
    ]
    parts = step_times([150.0, 160.0, 170.0], {"block_0": block, "lm_head": head})
    assert parts == {
        "products": 50,
        "small operators": 5,
        "LM head": 20,
        "between operators": 50,
        "outside": 35,
    }


def test_the_memory_of_this_machine_can_be_read() -> None:
    assert read_bandwidth(1) > 0


@pytest.mark.parametrize("preset", ["int8", "int4"])
def test_fewer_bits_are_fewer_bytes(tiny_graphs: EdgeGraphs, preset: Quantization) -> None:
    assert graph_weight_bytes(tiny_graphs.bundle(NUM_LAYERS, preset)) < graph_weight_bytes(
        tiny_graphs.bundle(NUM_LAYERS, "fp32")
    )


def test_the_plot_has_a_mark_for_each_engine() -> None:
    rows = [
        {
            "engine": engine,
            "preset": "4-bit",
            "threads": threads,
            "agreement": 0.96,
            **speed_quartiles([90.0, 100.0, 120.0]),
        }
        for engine in ("ours", "a < b & c")
        for threads in (1, 2)
    ]
    (axes,) = plot_engines(rows).axes
    assert axes.get_legend_handles_labels()[1] == ["ours 4-bit", "a < b & c 4-bit"]


def test_one_value_is_its_own_spread() -> None:
    assert speed_quartiles([5.0]) == {
        "tokens_per_s": 5.0,
        "tokens_per_s_low": 5.0,
        "tokens_per_s_high": 5.0,
    }


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown part speeed: expected some of speed, prefill"):
        parse_list("speeed,fidelity", edge.PARTS, "part")


def test_a_row_of_the_table_names_the_type_of_a_file_once_and_leaves_out_what_is_unknown() -> None:
    row = {
        "engine": "llama.cpp native Q4_1",
        "preset": "Q4_1",
        "threads": 2,
        "prefill_tokens_per_s": 812.4,
        "agreement": None,
        "instruction_sets": ["SSE3", "AVX2", "AVX512_VNNI", "OPENMP"],
    }
    expected = ["llama.cpp native", "Q4_1", "2", "", "", "812", "", "AVX512_VNNI"]
    assert cells(row) == expected


def test_a_machine_without_vectors_has_its_own_instructions() -> None:
    assert widest(["arm64"]) == "arm64"
    assert widest([]) == ""
