"""The instruction sets of graphs, and those that a machine has."""

from __future__ import annotations

import platform
import re
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Final

ANY: Final = "any"
MACHINES: Final = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "arm64", "arm64": "arm64"}
REQUIRED_FLAGS: Final = {
    "x86_64": frozenset[str](),
    "x86_64-avx2": frozenset({"avx2"}),
    "x86_64-avx512_vnni": frozenset({"avx512f", "avx512_vnni"}),
    "arm64": frozenset[str](),
}
CPUINFO: Final = Path("/proc/cpuinfo")


def covered_sets(machine: str, flags: Collection[str]) -> tuple[str, ...]:
    """Return the instruction sets of a `platform.machine()` with these flags, in Linux's names."""
    family = MACHINES.get(machine.lower())
    usable = (name for name, required in REQUIRED_FLAGS.items() if required <= {*flags})
    return tuple(name for name in usable if name.split("-")[0] == family)


def covers(available: Collection[str], required: str) -> bool:
    """Whether graphs for the set `required` run on a machine with the sets `available`."""
    return required == ANY or required in available


def cpu_flags(cpuinfo: str) -> frozenset[str]:
    """Return the flags of the first processor in the text of /proc/cpuinfo, if it has any."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def processor_name() -> str:
    """Return the name of this machine's processor."""
    cpuinfo = CPUINFO.read_text(encoding="utf-8") if CPUINFO.is_file() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


@cache
def machine_flags() -> frozenset[str]:
    """Return the flags of this machine's processor; none without /proc/cpuinfo."""
    return cpu_flags(CPUINFO.read_text(encoding="utf-8")) if CPUINFO.is_file() else frozenset()


@cache
def instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets of this machine.

    Without /proc/cpuinfo it is the plain one of its family.
    """
    return covered_sets(platform.machine(), machine_flags())
