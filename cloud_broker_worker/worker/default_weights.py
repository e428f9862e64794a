"""The choice of a worker's weights at its start, for `--weights auto`."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch

from cloud_broker_worker.worker.config import MIN_AGREEMENT, Weights
from cloud_broker_worker.worker.packed_linear import LM_HEAD, packed_layer
from cloud_broker_worker.worker.upper_layers import checked_layers, read_tensor
from fleet.bundles.instruction_sets import machine_flags
from fleet.bundles.manifest import Bundle
from fleet.bundles.tensor_file import TensorFile
from fleet.errors import BundleError
from fleet.utils.free_memory import free_memory

AGREEMENTS: Final[dict[str, dict[Weights, float]]] = {
    "SmolLM2-135M-Instruct": {"float32": 1.0, "bfloat16": 0.997, "int8": 0.987, "int4": 0.996}
}
"""The share of tokens that equal those of float32, by model; docs/worker.md has the source."""

SESSIONS: Final = (1, 4, 16, 64)
STEP_MS: Final[dict[str, dict[str, dict[Weights, tuple[float, ...]]]]] = {
    "SmolLM2-135M-Instruct": {
        "amx": {
            "float32": (14.8, 17.4, 25.8, 70.7),
            "bfloat16": (12.7, 13.7, 18.0, 54.2),
            "int8": (6.9, 9.6, 24.8, 99.3),
            "int4": (5.7, 8.5, 22.7, 96.0),
        },
        "avx512": {
            "float32": (15.2, 16.6, 25.6, 54.9),
            "bfloat16": (11.5, 21.8, 49.1, 146.6),
            "int8": (6.6, 9.3, 25.3, 79.5),
            "int4": (5.6, 8.1, 22.7, 77.1),
        },
        "avx2": {
            "float32": (15.1, 19.2, 31.9, 86.1),
            "bfloat16": (11.4, 22.8, 72.6, 338.5),
            "int8": (7.5, 11.4, 33.4, 136.5),
            "int4": (6.8, 10.8, 33.1, 129.9),
        },
    }
}
"""Milliseconds of a step of each of `SESSIONS`, by model and kind of processor; the same source."""

FLAGS: Final = {
    "amx": frozenset({"amx_bf16", "avx512f"}),
    "avx512": frozenset({"avx512f"}),
    "avx2": frozenset({"avx2"}),
}
"""Kinds of processors, the best first, with their flags in /proc/cpuinfo."""

MAX_RUNS: Final = 20
MAX_RUNS_S: Final = 0.2
MEMORY_SHARE: Final = 0.5
FLOAT32_BYTES: Final = 4


class WeightsChoice(NamedTuple):
    """Weights, and the reason for them in words."""

    weights: Weights
    reason: str


def choose_weights(bundle: Bundle, num_threads: int, num_sessions: int) -> WeightsChoice:
    """Return the weights that are fastest for a number of sessions and keep `MIN_AGREEMENT`.

    The times are those of `STEP_MS` for a model and a processor that it has, else measured now.

    Raises:
        BundleError: the cloud partition cannot be read, or there is none.
    """
    checked_layers(bundle.manifest, 0)
    model = bundle.manifest.model.name
    try:
        with TensorFile(bundle.path("cloud/model.safetensors")) as file:
            candidates = accurate_weights(model, file)
            if len(candidates) == 1:
                reason = f"no other kind is known to agree on {MIN_AGREEMENT:.1%} of tokens"
                return WeightsChoice(candidates[0], reason)
            processor = processor_kind(machine_flags())
            table = STEP_MS.get(model, {}).get(processor)
            if table:
                times = {kind: step_ms(table[kind], num_sessions) for kind in candidates}
                return fastest(times, num_sessions, f"on {processor}, by the table of this model")
            times = product_ms(file, candidates, num_threads, num_sessions)
            return fastest(times, num_sessions, "as measured now")
    except (OSError, ValueError) as error:
        raise BundleError(
            f"the cloud partition of {bundle.folder} cannot be read: {error}; "
            "export the bundle again"
        ) from None


def fastest(times: Mapping[Weights, float], num_sessions: int, source: str) -> WeightsChoice:
    """Return the kind with the shortest time."""
    weights = min(times, key=times.__getitem__)
    return WeightsChoice(weights, f"fastest for {num_sessions} sessions {source}")


def accurate_weights(model: str, file: TensorFile) -> list[Weights]:
    """Return the kinds of weights that keep `MIN_AGREEMENT`.

    Where no agreement was measured these are float32, and for weights that are stored in 16 bits
    also bfloat16; then float32 has to fit the memory.
    """
    if model in AGREEMENTS:
        known = AGREEMENTS[model].items()
        return [kind for kind, agreement in known if agreement >= MIN_AGREEMENT]
    if any(entry.dtype == "F32" for entry in file.entries.values()):
        return ["float32"]
    num_values = sum(int(np.prod(entry.shape)) for entry in file.entries.values())
    memory = free_memory()
    fits = memory is None or FLOAT32_BYTES * num_values <= MEMORY_SHARE * memory
    return ["bfloat16", "float32"] if fits else ["bfloat16"]


def processor_kind(flags: Collection[str]) -> str:
    """Return the kind of a processor with these flags, one of `FLAGS` or empty."""
    return next((kind for kind, needed in FLAGS.items() if needed <= {*flags}), "")


def step_ms(times: Sequence[float], num_sessions: int) -> float:
    """Return the time of a step, interpolated between the numbers of `SESSIONS`."""
    return float(np.interp(num_sessions, SESSIONS, times))


def product_ms(
    file: TensorFile, kinds: Sequence[Weights], num_threads: int, num_sessions: int
) -> dict[Weights, float]:
    """Measure the product of the partition's largest layer for a row of each session."""
    torch.set_num_threads(num_threads)
    sizes = {
        name: int(np.prod(entry.shape))
        for name, entry in file.entries.items()
        if len(entry.shape) == 2 and LM_HEAD not in name
    }
    weight = read_tensor(file, max(sizes, key=sizes.__getitem__))
    rows = torch.randn(num_sessions, weight.shape[1])
    return {kind: _shortest_ms(weight, kind, rows) for kind in kinds}


@torch.inference_mode()
def _shortest_ms(weight: torch.Tensor, kind: Weights, rows: torch.Tensor) -> float:
    """Return the time of the fastest call, the first one aside.

    It is infinite where PyTorch has no kernel for this processor.
    """
    try:
        layer = packed_layer("", weight, None, kind)
        layer(rows)
    except RuntimeError:
        return float("inf")
    begin = time.perf_counter()
    stops = [begin]
    while len(stops) <= MAX_RUNS and stops[-1] - begin < MAX_RUNS_S:
        layer(rows)
        stops.append(time.perf_counter())
    return 1e3 * float(np.diff(stops).min())
