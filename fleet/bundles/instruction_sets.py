"""Instruction sets that graphs are made for, and which of them a machine has."""

from __future__ import annotations

import platform
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Final

ANY: Final = "any"
MACHINES: Final = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "arm64", "arm64": "arm64"}
NEEDED_FLAGS: Final = {
    "x86_64": frozenset[str](),
    "x86_64-avx2": frozenset({"avx2"}),
    "x86_64-avx512_vnni": frozenset({"avx512f", "avx512_vnni"}),
    "arm64": frozenset[str](),
}
CPUINFO: Final = Path("/proc/cpuinfo")


def covered_sets(machine: str, flags: Collection[str]) -> tuple[str, ...]:
    """The instruction sets of a `platform.machine()` whose processor has these flags, in Linux's names."""
    family = MACHINES.get(machine.lower())
    return tuple(
        name
        for name, needed in NEEDED_FLAGS.items()
        if name.split("-")[0] == family and needed <= {*flags}
    )


def covers(offered: Collection[str], wanted: str) -> bool:
    """Whether graphs for `wanted` run where `offered` sets are."""
    return wanted == ANY or wanted in offered


def cpu_flags(cpuinfo: str) -> frozenset[str]:
    """The flags of the first processor in the text of /proc/cpuinfo; empty when it names none."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


@cache
def instruction_sets() -> tuple[str, ...]:
    """The instruction sets of this machine; without /proc/cpuinfo only the plain one of its family is known."""
    cpuinfo = CPUINFO.read_text() if CPUINFO.is_file() else ""
    return covered_sets(platform.machine(), cpu_flags(cpuinfo))
