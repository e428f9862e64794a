"""Time of a step by operator, from ONNX Runtime's profiler, and the machine's memory bandwidth."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort

from fleet.bundles.manifest import Bundle
from fleet.graphs.cascade import Cascade
from fleet.graphs.partition import Partition

POSITIONS: Final = (64, 1024)
CHUNKS: Final = (1, 2, 4, 8)
STEPS: Final = 40
PRODUCTS: Final = ("MatMulNBits", "MatMul", "Gemm")
ATTENTION: Final = "attention"
KINDS: Final = {
    **dict.fromkeys(PRODUCTS, "products"),
    "GroupQueryAttention": ATTENTION,
    "SimplifiedLayerNormalization": "norms",
    "SkipSimplifiedLayerNormalization": "norms",
}
LM_HEAD: Final = "LM head"
OTHER: Final = "small operators"
BETWEEN: Final = "between operators"
OUTSIDE: Final = "outside"
BANDWIDTH_BYTES: Final = 1 << 29
BANDWIDTH_TRIES: Final = 5


class ProfiledPartition(Partition):
    """A partition whose graphs record the time of each operator."""

    def __init__(self, bundle: Bundle, num_threads: int, folder: Path) -> None:
        super().__init__(bundle, num_threads)
        self._names = ["block_0", "lm_head"]
        sessions = [
            profiled(bundle.path(f"edge/{name}.onnx"), num_threads, folder / name)
            for name in self._names
        ]
        self.blocks = sessions[:1]
        self._lm_head = sessions[1]

    def finish(self) -> dict[str, list[dict[str, Any]]]:
        """Return the events of each graph."""
        sessions = (*self.blocks, self._lm_head)
        return {
            name: json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
            for name, session in zip(self._names, sessions, strict=True)
        }


def profiled(path: Path, num_threads: int, prefix: Path) -> ort.InferenceSession:
    """Load a graph as `fleet.graphs.ort_runtime.load_session` does, with profiling on."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(prefix)
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def profile_steps(
    bundle: Path, num_threads: int, positions: Sequence[int] = POSITIONS
) -> dict[int, dict[str, float]]:
    """Return the median microseconds of a step by kind of work, after each of some positions.

    The bundle has one block. `between operators` is ONNX Runtime's own time in addition to them,
    the profiler's writing included, and `outside` is the time of a step beyond its two runs:
    embedding, bindings, Python.
    """
    loaded = Bundle.load(bundle, ("edge",))
    return {position: profile_chunk(loaded, num_threads, position) for position in positions}


def profile_chunks(
    bundle: Path, num_threads: int, sizes: Sequence[int] = CHUNKS
) -> dict[int, dict[str, float]]:
    """Return the same for chunks of some sizes, at most `MAX_EXITS`, after the first of
    `POSITIONS`. The LM head runs over all positions of a chunk.
    """
    loaded = Bundle.load(bundle, ("edge",))
    return {size: profile_chunk(loaded, num_threads, POSITIONS[0], size) for size in sizes}


def profile_chunk(
    bundle: Bundle, num_threads: int, position: int, size: int = 1
) -> dict[str, float]:
    """Return the median microseconds of a chunk of `size` positions after `position`, by kind."""
    with tempfile.TemporaryDirectory(prefix="fleet-profile-") as folder:
        partition = ProfiledPartition(bundle, num_threads, Path(folder))
        cascade = Cascade(partition, position + size)
        cascade.append([100 + i % 200 for i in range(position)])
        cascade.run(0)
        times = []
        for i in range(STEPS):
            cascade.append(range(200 + i, 200 + i + size))
            start = time.perf_counter()
            cascade.fill(0, num_last=size)
            cascade.exits(0, position, position + size)
            times.append((time.perf_counter() - start) * 1e6)
            cascade.truncate(position)
        return step_times(times, partition.finish())


def step_times(
    whole: Sequence[float], events: Mapping[str, list[dict[str, Any]]]
) -> dict[str, float]:
    """Return medians by kind, in microseconds, of steps that took `whole`.

    Each step is the last run of every graph so far.
    """
    steps = [defaultdict(float, {OUTSIDE: time_us}) for time_us in whole]
    for graph, listed in events.items():
        runs = [event for event in listed if event["name"] == "model_run"][-len(steps) :]
        operators = [
            event
            for event in listed
            if event["cat"] == "Node" and event["name"].endswith("kernel_time")
        ]
        for step, run in zip(steps, runs, strict=True):
            inside = [
                event for event in operators if run["ts"] <= event["ts"] < run["ts"] + run["dur"]
            ]
            for event in inside:
                step[
                    LM_HEAD if graph == "lm_head" else KINDS.get(event["args"]["op_name"], OTHER)
                ] += event["dur"]
            step[BETWEEN] += run["dur"] - sum(event["dur"] for event in inside)
            step[OUTSIDE] -= run["dur"]
    return {kind: median(step[kind] for step in steps) for kind in set().union(*steps)}


def operators_only(step: Mapping[str, float]) -> float:
    """Return the microseconds of a step's operators except for attention."""
    return sum(
        time_us for kind, time_us in step.items() if kind not in (ATTENTION, BETWEEN, OUTSIDE)
    )


def graph_weight_bytes(bundle: Path) -> int:
    """Return the bytes of the graphs' weights, which a step reads once.

    The rotary tables and shapes are not weights.
    """
    total = 0
    for path in sorted((bundle / "edge").glob("*.onnx")):
        graph = onnx.load(path).graph
        used = {name for node in graph.node if node.op_type in PRODUCTS for name in node.input[1:]}
        total += sum(len(tensor.raw_data) for tensor in graph.initializer if tensor.name in used)
    return total


def read_bandwidth(num_threads: int) -> float:
    """Return the best bytes per second of threads that read an array larger than any cache."""
    parts = np.array_split(np.ones(BANDWIDTH_BYTES // 4, np.float32), num_threads)
    best = 0.0
    for _ in range(BANDWIDTH_TRIES):
        threads = [threading.Thread(target=part.max) for part in parts]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, BANDWIDTH_BYTES / (time.perf_counter() - start))
    return best
