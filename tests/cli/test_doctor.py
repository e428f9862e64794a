"""`fleet doctor` on this machine, in a bare environment, and with faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from edge_agent.config import AgentConfig
from fleet.bundles.instruction_sets import instruction_sets

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120
DOCTOR = "from fleet.cli import main; main()"


def doctor(
    *options: str, python: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *python, "-c", DOCTOR, "doctor", *options],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        cwd=ROOT,
        env=os.environ | environment,
    )


def extras_of(diagnosis: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {extra["name"]: extra for extra in diagnosis["extras"]}


def add_distribution(folder: Path, name: str, version: str) -> None:
    """Write the metadata of an installed package, as pip does."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture(scope="module")
def base_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with this distribution, its base requirements, and nothing else."""
    folder = tmp_path_factory.mktemp("base")
    names = ["cecollm-fleet", "packaging"]
    seen = set[str]()
    while names:
        if (name := names.pop()) in seen:
            continue
        seen.add(name)
        found = distribution(name)
        requirements = map(Requirement, found.requires or ())
        names += [
            r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})
        ]
        for top in {path.parts[0] for path in found.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(str(found.locate_file(top)))
    return folder


def test_it_reports_the_packages_and_resources_of_this_machine() -> None:
    result = doctor("--json")
    assert result.returncode == 0, result.stdout + result.stderr
    diagnosis = json.loads(result.stdout)
    assert diagnosis["onnxruntime"] == {"onnxruntime": version("onnxruntime")}
    assert "CPUExecutionProvider" in diagnosis["providers"]
    assert tuple(diagnosis["instruction_sets"]) == instruction_sets()
    assert diagnosis["num_cores"] == os.cpu_count()
    assert diagnosis["num_threads"] == AgentConfig().num_threads
    assert diagnosis["free_disk_bytes"] > 0
    assert diagnosis["packages"]["torch"] == version("torch")
    assert diagnosis["problems"] == []
    assert [name for name, extra in extras_of(diagnosis).items() if extra["missing"]] == [
        "edge-gpu"
    ]


def test_the_disk_is_examined_without_a_home_that_exists_or_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    home = tmp_path / "file" / "home"
    result = doctor("--json", HOME=str(home), FLEET_HOME=str(home / "fleet"))
    assert result.returncode == 0, result.stdout + result.stderr
    diagnosis = json.loads(result.stdout)
    assert diagnosis["disk_folder"] == str(tmp_path)
    assert diagnosis["free_disk_bytes"] > 0


def test_another_onnxruntime_is_installed_after_the_present_one_is_removed() -> None:
    install = extras_of(json.loads(doctor("--json").stdout))["edge-gpu"]["install"]
    assert install == "pip uninstall -y onnxruntime && pip install 'cecollm-fleet[edge-gpu]'"


def test_the_base_package_alone_is_no_problem_and_each_extra_has_its_pip_line(
    base_packages: Path,
) -> None:
    bare = {"python": ("-S",), "PYTHONPATH": f"{base_packages}:{ROOT}"}
    result = doctor("--json", **bare)  # type: ignore[arg-type]
    assert result.returncode == 0, result.stdout + result.stderr
    diagnosis = json.loads(result.stdout)
    assert diagnosis["onnxruntime"] == {}
    assert diagnosis["providers"] == []
    for name, extra in extras_of(diagnosis).items():
        assert extra["missing"]
        assert extra["install"] == f"pip install 'cecollm-fleet[{name}]'"
    assert "pip install 'cecollm-fleet[edge]'" in doctor(**bare).stdout  # type: ignore[arg-type]


def test_both_onnxruntime_packages_are_a_problem_with_its_remedy(
    tmp_path: Path,
) -> None:
    add_distribution(tmp_path, "onnxruntime-gpu", "1.30.0")
    result = doctor(PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    (problem,) = [line for line in result.stdout.splitlines() if line.startswith("problem")]
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in problem
    assert "pip install 'cecollm-fleet[edge]'" in problem


def test_an_onnxruntime_that_does_not_load_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime/__init__.py").write_text(
        "raise ImportError('libcudart.so.12 is not there')"
    )
    result = doctor("--json", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    (problem,) = json.loads(result.stdout)["problems"]
    assert "libcudart.so.12" in problem
    assert "pip install --force-reinstall onnxruntime" in problem


def test_a_package_that_is_too_old_is_named_with_its_version(tmp_path: Path) -> None:
    add_distribution(tmp_path, "tokenizers", "0.1.0")
    diagnosis = json.loads(doctor("--json", PYTHONPATH=str(tmp_path)).stdout)
    assert extras_of(diagnosis)["edge"]["missing"] == ["tokenizers>=0.21 (found 0.1.0)"]
