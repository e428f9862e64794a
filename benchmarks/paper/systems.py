"""The systems that the paper's experiments compare: processes on either side, and requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

Device = Literal["agent", "agent_int8", "client", "llama.cpp", "genai"]
Cloud = Literal["worker", "whole", "upper", "llama.cpp", "genai"]


@dataclass(frozen=True, kw_only=True)
class System:
    """A system of the experiments.

    `device` and `cloud` name processes of `benchmarks.paper.rig`; `op` and `options` are the
    request to the device's. `threshold` None are the bundle's own, where a system has any.
    """

    name: str
    device: Device
    cloud: Cloud | None
    op: str = "answer"
    options: Mapping[str, Any] = field(default_factory=dict)
    threshold: float | None = None


def _ours(name: str, mode: str, threshold: float | None = None, device: Device = "agent") -> System:
    return System(
        name=name, device=device, cloud="worker", options={"mode": mode}, threshold=threshold
    )


def _split(name: str, dtype: str, *, history: bool = False) -> System:
    return System(
        name=name,
        device="client",
        cloud="upper",
        op="split",
        options={"dtype": dtype, "history": history},
    )


CALIBRATED: Final = "collaborative@calibrated"
NAIVE_SPLIT: Final = "naive_split"
CLOUD_ONLY: Final = "cloud_only"

SYSTEMS: Final = {
    system.name: system
    for system in (
        System(name="standalone", device="agent", cloud=None, options={"mode": "standalone"}),
        _ours("collaborative@0.7", "collaborative", 0.7),
        _ours("collaborative@0.8", "collaborative", 0.8),
        _ours("collaborative@0.9", "collaborative", 0.9),
        _ours("collaborative@1.0", "collaborative", 1.0),
        _ours(CALIBRATED, "collaborative"),
        _ours("collaborative_int8@calibrated", "collaborative", device="agent_int8"),
        _ours("verified", "verified"),
        System(name=CLOUD_ONLY, device="client", cloud="whole", op="cloud_only"),
        _split(NAIVE_SPLIT, "float32", history=True),
        _split("cached_split_fp32", "float32"),
        _split("cached_split_fp16", "float16"),
        System(name="llama.cpp_device", device="llama.cpp", cloud=None),
        System(name="genai_device", device="genai", cloud=None),
        System(name="llama.cpp_cloud", device="client", cloud="llama.cpp", op="cloud_only"),
        System(name="genai_cloud", device="client", cloud="genai", op="cloud_only"),
    )
}
PEERS: Final = tuple(
    name
    for name, system in SYSTEMS.items()
    if {system.device, system.cloud} & {"llama.cpp", "genai"}
)
"""Systems that need other projects' engines."""
OWN: Final = tuple(name for name in SYSTEMS if name not in PEERS)
