"""ONNX Runtime: providers, graphs that it cannot load, bundles for other machines, lack of
memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from fleet.bundles.instruction_sets import REQUIRED_FLAGS, instruction_sets
from fleet.bundles.manifest import Bundle
from fleet.errors import BundleError, ConfigError
from fleet.graphs import ort_runtime
from fleet.graphs.ort_runtime import (
    CPU,
    CUDA,
    Runtime,
    check_instruction_set,
    choose_providers,
    is_out_of_memory,
    load_session,
)


def graph(op: str, domain: str = "", opset: int = 17, ir_version: int = 8) -> bytes:
    """A model of one node, [n] int64 in and float32 out."""
    x = helper.make_tensor_value_info("x", TensorProto.INT64, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])
    opsets = {"": opset} | ({domain: 1} if domain else {})
    model = helper.make_model(
        helper.make_graph([helper.make_node(op, ["x"], ["y"], domain=domain)], "graph", [x], [y]),
        opset_imports=[helper.make_opsetid(*item) for item in opsets.items()],
        ir_version=ir_version,
    )  # fmt: skip
    return bytes(model.SerializeToString())


GOOD = graph("ConstantOfShape")
UNLOADABLE = {
    "an unknown domain": graph("Rotate", "org.example"),
    "an operator that is newer than the runtime": graph("FlashAttention9", "com.microsoft"),
    "an opset of the future": graph("ConstantOfShape", opset=999),
    "a format of the future": graph("ConstantOfShape", ir_version=999),
    "a truncated file": GOOD[: len(GOOD) // 2],
    "an empty file": b"",
}


@pytest.mark.parametrize("content", UNLOADABLE.values(), ids=UNLOADABLE)
def test_a_graph_that_does_not_load_says_who_made_it_and_what_to_do(
    content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "block_0.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError) as caught:
        load_session(path, Runtime(), {"onnxruntime": "9.8.7"})
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        str(path),
        ort.__version__,
        "made with 9.8.7",
        "upgrade",
        "export or copy the bundle again",
    ):
        assert part in message


def test_a_good_graph_loads_and_runs(tmp_path: Path) -> None:
    path = tmp_path / "block_0.onnx"
    path.write_bytes(GOOD)
    (ones,) = load_session(path, Runtime(num_threads=2)).run(None, {"x": np.array([3])})
    assert ones.shape == (3,)


def test_the_mapped_weights_of_a_loaded_graph_are_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    returned: list[Path] = []
    monkeypatch.setattr(ort_runtime, "release_mapped_pages", returned.append)
    path = tmp_path / "block_0.onnx"
    path.write_bytes(GOOD)
    load_session(path, Runtime())
    assert returned == [tmp_path / "block_0.onnx.data"]


@pytest.mark.parametrize(
    ("wanted", "available", "chosen"),
    [
        ("auto", (CPU,), [CPU]),
        ("auto", ("TensorrtExecutionProvider", CUDA, CPU), [CUDA, CPU]),
        ("cpu", (CUDA, CPU), [CPU]),
        ("cuda", (CUDA, CPU), [CUDA, CPU]),
    ],
)
def test_the_provider_is_the_wanted_one_of_those_installed(
    wanted: str, available: tuple[str, ...], chosen: list[str]
) -> None:
    assert choose_providers(wanted, available) == chosen  # type: ignore[arg-type]


def test_cuda_where_it_is_not_installed_says_what_is_and_what_to_install() -> None:
    with pytest.raises(ConfigError, match=rf"{CPU}.*pip uninstall -y onnxruntime.*\[edge-gpu\]"):
        choose_providers("cuda", (CPU,))


@pytest.mark.parametrize("instruction_set", ["any", *instruction_sets()])
def test_a_bundle_for_this_machine_is_accepted(tiny_bundle: Bundle, instruction_set: str) -> None:
    check_instruction_set(
        msgspec.structs.replace(tiny_bundle.manifest, instruction_set=instruction_set)
    )


@pytest.mark.parametrize(
    "instruction_set", [*sorted(set(REQUIRED_FLAGS) - set(instruction_sets())), "z80"]
)
def test_a_bundle_for_another_machine_is_refused_and_both_are_named(
    tiny_bundle: Bundle, instruction_set: str
) -> None:
    manifest = msgspec.structs.replace(tiny_bundle.manifest, instruction_set=instruction_set)
    with pytest.raises(BundleError) as caught:
        check_instruction_set(manifest)
    for part in (instruction_set, *instruction_sets(), "export"):
        assert part in str(caught.value)


def test_lack_of_memory_is_told_from_other_errors(tmp_path: Path) -> None:
    path = tmp_path / "block_0.onnx"
    path.write_bytes(GOOD)
    session = load_session(path, Runtime())
    with pytest.raises(Exception) as huge:  # noqa: PT011  ONNX Runtime's errors have no common type
        session.run(None, {"x": np.array([1 << 44])})
    with pytest.raises(Exception) as wrong:  # noqa: PT011
        session.run(None, {"x": np.array([1.5])})
    assert is_out_of_memory(huge.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(wrong.value)


@pytest.mark.parametrize(
    "module", ["fleet.graphs.cascade", "onnx_export.parity", "benchmarks.breakdown"]
)
def test_onnx_runtime_sends_no_telemetry(module: str, tmp_path: Path) -> None:
    """Its telemetry makes an id and a database in the home when the library is loaded."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("ORT_")}
    script = f"import {module}, onnxruntime, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    process = subprocess.run(
        [sys.executable, "-c", script],
        env=environment | {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stdout == "1\n", process.stderr
    assert not [path for path in tmp_path.rglob("*") if "onnxruntime" in path.name.lower()]
    assert not list(tmp_path.rglob("*deviceid*"))
