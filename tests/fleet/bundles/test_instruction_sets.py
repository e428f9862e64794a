"""Instruction sets by a machine's name and its processor's flags."""

from __future__ import annotations

import platform

import pytest

from fleet.bundles.instruction_sets import (
    CPUINFO,
    MACHINES,
    covered_sets,
    covers,
    cpu_flags,
    instruction_sets,
)


@pytest.mark.parametrize(
    ("machine", "flags", "sets"),
    [
        ("x86_64", (), ("x86_64",)),
        ("AMD64", ("sse2", "avx2"), ("x86_64", "x86_64-avx2")),
        ("x86_64", ("avx2", "avx512f"), ("x86_64", "x86_64-avx2")),
        (
            "x86_64",
            ("avx2", "avx512f", "avx512_vnni"),
            ("x86_64", "x86_64-avx2", "x86_64-avx512_vnni"),
        ),
        ("aarch64", ("asimd", "asimddp"), ("arm64",)),
        ("arm64", (), ("arm64",)),
        ("riscv64", (), ()),
    ],
)
def test_a_machine_covers_the_sets_of_its_family_and_flags(
    machine: str, flags: tuple[str, ...], sets: tuple[str, ...]
) -> None:
    assert covered_sets(machine, flags) == sets


def test_any_runs_anywhere_and_a_set_only_where_it_is() -> None:
    assert covers((), "any")
    assert covers(("x86_64",), "x86_64")
    assert not covers(("x86_64",), "arm64")


@pytest.mark.parametrize(
    ("cpuinfo", "flags"),
    [
        (
            "processor\t: 0\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nflags\t\t: fpu\n",
            {"fpu", "avx2"},
        ),
        ("processor\t: 0\nFeatures\t: fp asimd\n", {"fp", "asimd"}),
        ("", set()),
    ],
)
def test_flags_are_read_from_the_first_processor(cpuinfo: str, flags: set[str]) -> None:
    assert cpu_flags(cpuinfo) == flags


def test_this_machine_is_of_its_own_family() -> None:
    family = MACHINES[platform.machine().lower()]
    assert instruction_sets()[0] == family
    if CPUINFO.exists():
        assert ("x86_64-avx2" in instruction_sets()) == (" avx2 " in CPUINFO.read_text())
