"""`fleet doctor`: what this machine has for each part of a fleet, and what to do where something is wrong."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Final

import msgspec
import typer
from msgspec import Struct
from packaging.requirements import Requirement

from fleet import __version__
from fleet.bundles.instruction_sets import instruction_sets
from fleet.cli.fleet_checks import Check, check_fleet
from fleet.cli.stats import JsonOption, StateOption
from fleet.errors import ConfigError
from fleet.server.home import STATE_FILE, FleetHome
from fleet.utils.optional_imports import load

DISTRIBUTION: Final = "cecollm-fleet"
EXTRAS: Final = ("edge", "edge-gpu", "worker", "export", "server")
RUNTIME_OF: Final = {"edge": "onnxruntime", "edge-gpu": "onnxruntime-gpu"}
MEMINFO: Final = Path("/proc/meminfo")
MOSQUITTO_FOLDERS: Final = "/usr/sbin:/usr/local/sbin"
GB: Final = 1 << 30


class Extra(Struct, frozen=True):
    """One optional part. `missing` are its requirements that are not met; `install` is what brings them."""

    name: str
    missing: tuple[str, ...]
    install: str | None


class Diagnosis(Struct, frozen=True, kw_only=True):
    """What was found. `problems` are what must be mended; an optional part that is missing is none."""

    version: str
    python: str
    machine: str
    packages: dict[str, str]
    onnxruntime: dict[str, str]
    providers: tuple[str, ...]
    instruction_sets: tuple[str, ...]
    num_cores: int
    num_threads: int
    free_memory_bytes: int | None
    free_disk_bytes: int
    extras: tuple[Extra, ...]
    mosquitto: str | None
    fleet: tuple[Check, ...]
    problems: tuple[str, ...]


def doctor(state: StateOption = None, as_json: JsonOption = False) -> None:
    """Say what this machine has for each part of a fleet, and how its fleet is; exit status 1 if something is wrong."""
    folder = state or FleetHome.default_folder()
    diagnosis = diagnose(check_fleet(folder) if state or (folder / STATE_FILE).exists() else ())
    if as_json:
        print(msgspec.json.encode(diagnosis).decode())
    else:
        print("\n".join(lines(diagnosis)))
    if diagnosis.problems:
        raise typer.Exit(1)


def diagnose(fleet: tuple[Check, ...] = ()) -> Diagnosis:
    """Looks at this machine and this Python's packages; nothing heavy is imported but ONNX Runtime, if it is there."""
    wanted = requirements()
    problems = [
        f"{DISTRIBUTION} needs {unmet}; run: pip install --upgrade {DISTRIBUTION}"
        for unmet in missing(wanted, "")
    ]
    runtimes = {name: found for name in RUNTIME_OF.values() if (found := installed(name))}
    if len(runtimes) > 1:
        problems.append(
            f"{' and '.join(runtimes)} are both installed and overwrite each other; run: pip uninstall -y "
            f"{' '.join(runtimes)}, and then: pip install '{DISTRIBUTION}[edge]', or [edge-gpu] for CUDA"
        )
    providers: tuple[str, ...] = ()
    if runtimes:
        try:
            providers = tuple(importlib.import_module("onnxruntime").get_available_providers())
        except Exception as error:  # noqa: BLE001  a broken installation fails in any way
            problems.append(
                f"{' '.join(runtimes)} is installed but does not load ({error}); run: pip install --force-reinstall "
                f"{' '.join(runtimes)}"
            )
    names = {requirement.name for requirement in wanted if in_extra(requirement, "", *EXTRAS)}
    return Diagnosis(
        version=__version__,
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}",
        packages={name: found for name in sorted(names) if (found := installed(name))},
        onnxruntime=runtimes,
        providers=providers,
        instruction_sets=instruction_sets(),
        num_cores=os.cpu_count() or 1,
        num_threads=load("edge_agent.config").AgentConfig().num_threads,
        free_memory_bytes=free_memory(),
        free_disk_bytes=shutil.disk_usage(Path.home()).free,
        extras=tuple(examine(name, missing(wanted, name), runtimes) for name in EXTRAS),
        mosquitto=shutil.which(
            "mosquitto", path=f"{os.environ.get('PATH', '')}:{MOSQUITTO_FOLDERS}"
        ),
        fleet=fleet,
        problems=(
            *problems,
            *(f"{check.name}: {check.problem}" for check in fleet if check.problem),
        ),
    )


def requirements() -> list[Requirement]:
    """What this distribution needs, all extras included; raises ConfigError when it runs without being installed."""
    try:
        return [Requirement(line) for line in metadata(DISTRIBUTION).get_all("Requires-Dist") or ()]
    except PackageNotFoundError:
        raise ConfigError(
            f"{DISTRIBUTION} runs from its sources and is not installed; run: pip install ."
        ) from None


def in_extra(requirement: Requirement, *extras: str) -> bool:
    """Whether one of the extras needs it, here; the extra "" is the base."""
    return requirement.marker is None or any(
        requirement.marker.evaluate({"extra": extra}) for extra in extras
    )


def missing(wanted: list[Requirement], extra: str) -> tuple[str, ...]:
    """The requirements of an extra that no installed package meets, each with what there is instead."""
    unmet = []
    for requirement in wanted:
        if in_extra(requirement, extra) and (requirement.marker is not None or not extra):
            found = installed(requirement.name)
            if found is None:
                unmet.append(f"{requirement.name}{requirement.specifier}")
            elif not requirement.specifier.contains(found, prereleases=True):
                unmet.append(f"{requirement.name}{requirement.specifier} (found {found})")
    return tuple(unmet)


def examine(name: str, unmet: tuple[str, ...], runtimes: Collection[str]) -> Extra:
    """An extra, and what brings it without leaving two packages of ONNX Runtime."""
    if not unmet:
        return Extra(name, (), None)
    others = [other for other in runtimes if other != RUNTIME_OF.get(name, other)]
    install = f"pip install '{DISTRIBUTION}[{name}]'"
    return Extra(
        name, unmet, f"pip uninstall -y {' '.join(others)} && {install}" if others else install
    )


def installed(package: str) -> str | None:
    """The version of an installed package, which is not imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def free_memory() -> int | None:
    """Bytes that can be had without swapping, where Linux says so."""
    if not MEMINFO.is_file():
        return None
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def lines(diagnosis: Diagnosis) -> list[str]:
    """The diagnosis for people."""
    memory = diagnosis.free_memory_bytes
    facts = {
        "fleet": diagnosis.version,
        "python": f"{diagnosis.python} on {diagnosis.machine}",
        "ONNX Runtime": ", ".join(
            f"{name} {found}" for name, found in diagnosis.onnxruntime.items()
        )
        or "none",
        "providers": ", ".join(diagnosis.providers) or "none",
        "instructions": ", ".join(diagnosis.instruction_sets) or "none that bundles are made for",
        "cores": f"{diagnosis.num_cores}; a device uses {diagnosis.num_threads} threads unless told otherwise",
        "free memory": "unknown" if memory is None else f"{memory / GB:.1f} GB",
        "free disk": f"{diagnosis.free_disk_bytes / GB:.1f} GB in {Path.home()}",
        "mosquitto": diagnosis.mosquitto or "not found; the broker inside 'fleet up' needs none",
    }
    for extra in diagnosis.extras:
        facts[f"extra {extra.name}"] = (
            f"lacks {', '.join(extra.missing)}; {extra.install}" if extra.missing else "complete"
        )
    facts["packages"] = ", ".join(f"{name} {found}" for name, found in diagnosis.packages.items())
    width = max(map(len, facts))
    checked = [f"{check.name:{width}}  {check.found}" for check in diagnosis.fleet]
    found = [f"problem: {problem}" for problem in diagnosis.problems] or ["no problem found"]
    return [*(f"{name:{width}}  {value}" for name, value in facts.items()), *checked, *found]
