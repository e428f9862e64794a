"""`fleet doctor`: the packages and resources of this machine, and the state of its fleet."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Final

import typer
from msgspec import Struct
from packaging.requirements import Requirement

from edge_agent.config import AgentConfig
from fleet.bundles.instruction_sets import instruction_sets
from fleet.cli.access import call_fleet, is_remote
from fleet.cli.options import HomeOption, JsonOption, print_json
from fleet.errors import ConfigError
from fleet.operator_api.audit_operations import CHECK_FLEET, Check
from fleet.operator_api.operation import NoFields
from fleet.server.fleet_checks import check_fleet
from fleet.server.home import FleetHome
from fleet.utils.free_memory import free_memory
from fleet.utils.paths import existing_folder
from fleet.utils.printable import printable
from fleet.version import __version__

DISTRIBUTION: Final = "cecollm-fleet"
EXTRAS: Final = ("edge", "edge-gpu", "worker", "export", "server")
RUNTIME_OF: Final = {"edge": "onnxruntime", "edge-gpu": "onnxruntime-gpu"}
MOSQUITTO_FOLDERS: Final = "/usr/sbin:/usr/local/sbin"
GB: Final = 1 << 30


class ExtraState(Struct, frozen=True):
    """An extra, its requirements that are not met, and the command that installs them."""

    name: str
    missing: tuple[str, ...]
    install: str | None


class Diagnosis(Struct, frozen=True, kw_only=True):
    """The state of this machine; a missing extra is not among its `problems`."""

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
    disk_folder: str
    extras: tuple[ExtraState, ...]
    mosquitto: str | None
    fleet: tuple[Check, ...]
    problems: tuple[str, ...]


def doctor(folder: HomeOption = None, as_json: JsonOption = False) -> None:
    """Check this machine and its fleet; exit status 1 when there is a problem."""
    fleet_folder = FleetHome.find(folder)
    diagnosis = diagnose(_fleet_checks(folder, fleet_folder), fleet_folder)
    if as_json:
        print_json(diagnosis)
    else:
        print("\n".join(map(printable, diagnosis_lines(diagnosis))))
    if diagnosis.problems:
        raise typer.Exit(1)


def _fleet_checks(folder: Path | None, fleet_folder: Path) -> tuple[Check, ...]:
    """Return the checks of the fleet, which the server that was chosen runs itself."""
    if is_remote():
        return call_fleet(folder, CHECK_FLEET, NoFields()).checks
    has_fleet = folder is not None or FleetHome.is_fleet(fleet_folder)
    return check_fleet(fleet_folder) if has_fleet else ()


def diagnose(fleet: tuple[Check, ...] = (), folder: Path = Path("/")) -> Diagnosis:
    """Examine this machine and this Python's packages; imports ONNX Runtime if it is installed.

    `folder` is the fleet's, whose disk is examined; it need not exist.
    """
    disk_folder = existing_folder(folder)
    required = requirements()
    runtimes = package_versions(RUNTIME_OF.values())
    providers, runtime_problems = check_runtimes(runtimes)
    path = f"{os.environ.get('PATH', '')}:{MOSQUITTO_FOLDERS}"
    return Diagnosis(
        version=__version__,
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}",
        packages=package_versions({each.name for each in required if in_extra(each, "", *EXTRAS)}),
        onnxruntime=runtimes,
        providers=providers,
        instruction_sets=instruction_sets(),
        num_cores=os.cpu_count() or 1,
        num_threads=AgentConfig().num_threads,
        free_memory_bytes=free_memory(),
        free_disk_bytes=shutil.disk_usage(disk_folder).free,
        disk_folder=str(disk_folder),
        extras=tuple(extra_state(name, unmet(required, name), runtimes) for name in EXTRAS),
        mosquitto=shutil.which("mosquitto", path=path),
        fleet=fleet,
        problems=(
            *(
                f"{DISTRIBUTION} needs {each}; run: pip install --upgrade {DISTRIBUTION}"
                for each in unmet(required, "")
            ),
            *runtime_problems,
            *(f"{check.name}: {check.problem}" for check in fleet if check.problem),
        ),
    )


def check_runtimes(runtimes: Collection[str]) -> tuple[tuple[str, ...], list[str]]:
    """The execution providers of the installed ONNX Runtime, and its problems."""
    problems = []
    if len(runtimes) > 1:
        problems.append(
            f"{' and '.join(runtimes)} are both installed and overwrite each other; "
            f"run: pip uninstall -y {' '.join(runtimes)}, "
            f"and then: pip install '{DISTRIBUTION}[edge]', or [edge-gpu] for CUDA"
        )
    if not runtimes:
        return (), problems
    try:
        import onnxruntime

        return tuple(onnxruntime.get_available_providers()), problems
    except Exception as error:  # noqa: BLE001  a broken installation fails in any way
        names = " ".join(runtimes)
        problems.append(
            f"{names} is installed but does not load ({error}); "
            f"run: pip install --force-reinstall {names}"
        )
    return (), problems


def requirements() -> list[Requirement]:
    """The requirements of this distribution with all extras.

    Raises:
        ConfigError: it runs without being installed.
    """
    try:
        return [Requirement(line) for line in metadata(DISTRIBUTION).get_all("Requires-Dist") or ()]
    except PackageNotFoundError:
        raise ConfigError(
            f"{DISTRIBUTION} runs from its sources and is not installed; run: pip install ."
        ) from None


def in_extra(requirement: Requirement, *extras: str) -> bool:
    """Whether one of the extras needs the requirement on this machine; "" is the base."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)


def unmet(required: list[Requirement], extra: str) -> tuple[str, ...]:
    """The requirements of an extra that no installed package meets, with the installed version."""
    texts = []
    for requirement in required:
        if not in_extra(requirement, extra) or (requirement.marker is None and extra):
            continue
        text = f"{requirement.name}{requirement.specifier}"
        installed = package_version(requirement.name)
        if installed is None:
            texts.append(text)
        elif not requirement.specifier.contains(installed, prereleases=True):
            texts.append(f"{text} (found {installed})")
    return tuple(texts)


def extra_state(name: str, missing: tuple[str, ...], runtimes: Collection[str]) -> ExtraState:
    """An extra with the command that installs it, and that leaves one package of ONNX Runtime."""
    if not missing:
        return ExtraState(name, (), None)
    install = f"pip install '{DISTRIBUTION}[{name}]'"
    others = [other for other in runtimes if other != RUNTIME_OF.get(name, other)]
    if others:
        install = f"pip uninstall -y {' '.join(others)} && {install}"
    return ExtraState(name, missing, install)


def package_versions(packages: Collection[str]) -> dict[str, str]:
    """The versions of the installed ones of `packages`, which are not imported."""
    by_name = {name: package_version(name) for name in sorted(packages)}
    return {name: installed for name, installed in by_name.items() if installed}


def package_version(package: str) -> str | None:
    """The version of an installed package, which is not imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def diagnosis_lines(diagnosis: Diagnosis) -> list[str]:
    """The diagnosis as text."""
    facts = machine_facts(diagnosis)
    for extra in diagnosis.extras:
        state = (
            f"lacks {', '.join(extra.missing)}; {extra.install}" if extra.missing else "complete"
        )
        facts[f"extra {extra.name}"] = state
    facts["packages"] = _names(diagnosis.packages)
    facts |= {check.name: check.found for check in diagnosis.fleet}
    width = max(map(len, facts))
    problems = [f"problem: {problem}" for problem in diagnosis.problems]
    return [
        *(f"{name:{width}}  {value}" for name, value in facts.items()),
        *(problems or ["no problem found"]),
    ]


def machine_facts(diagnosis: Diagnosis) -> dict[str, str]:
    """Lines about the machine by title."""
    memory = diagnosis.free_memory_bytes
    return {
        "fleet": diagnosis.version,
        "python": f"{diagnosis.python} on {diagnosis.machine}",
        "ONNX Runtime": _names(diagnosis.onnxruntime) or "none",
        "providers": ", ".join(diagnosis.providers) or "none",
        "instructions": ", ".join(diagnosis.instruction_sets) or "none that bundles are made for",
        "cores": f"{diagnosis.num_cores}; a device uses {diagnosis.num_threads} threads by default",
        "free memory": "unknown" if memory is None else f"{memory / GB:.1f} GB",
        "free disk": f"{diagnosis.free_disk_bytes / GB:.1f} GB in {diagnosis.disk_folder}",
        "mosquitto": diagnosis.mosquitto or "not found; the broker inside 'fleet up' needs none",
    }


def _names(packages: dict[str, str]) -> str:
    return ", ".join(f"{name} {installed}" for name, installed in packages.items())
