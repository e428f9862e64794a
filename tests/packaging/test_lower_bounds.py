"""The least version of each package that pyproject.toml allows runs the whole system."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Final

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.packaging.environments import ROOT, build_project_wheel, install_lowest, run

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(600)]

EXTRAS: Final = ("edge", "worker", "export", "server", "postgres", "plots")
ABOVE_THEIR_BOUND: Final = {
    "torch",  # `export` pins it; 2.7.0 with `worker` alone was tried by hand (gigabytes)
    "tokenizers",  # transformers needs a newer one; test_edge_wheel.py has the least
}
IMPORT_ALL: Final = """
import importlib, pkgutil
for name in ("fleet", "edge_agent", "cloud_broker_worker", "onnx_export", "provisioning"):
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, f"{name}."):
        if not module.name.endswith(("__main__", "migrations.env")):
            importlib.import_module(module.name)
"""
VERSIONS: Final = """
import importlib.metadata, json
print(json.dumps({p.name: p.version for p in importlib.metadata.distributions()}))
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the programs of an environment with the least versions of all extras but two.

    `bench` and `dev` run on no machine of a user.
    """
    folder = tmp_path_factory.mktemp("lowest")
    wheel = build_project_wheel(folder)
    return install_lowest(folder, f"{wheel}[{','.join(EXTRAS)}]")


def direct_requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]
    return [Requirement(line) for line in lines]


def lower_bound(requirement: Requirement) -> Version:
    bounds = [each for each in requirement.specifier if each.operator in (">=", "==")]
    assert len(bounds) == 1, f"{requirement} has no lower bound"
    return Version(bounds[0].version)


def test_each_lower_bound_is_a_version_that_is_tried(programs: Path, tmp_path: Path) -> None:
    versions = json.loads(run(programs / "python", "-c", VERSIONS, folder=tmp_path))
    installed = {canonicalize_name(name): Version(text) for name, text in versions.items()}
    untried = {
        requirement.name: str(installed[canonicalize_name(requirement.name)])
        for requirement in direct_requirements()
        if requirement.name not in ABOVE_THEIR_BOUND
        and installed[canonicalize_name(requirement.name)] != lower_bound(requirement)
    }
    assert untried == {}, "state these versions as the bounds"


def test_every_module_is_imported_with_the_least_versions(programs: Path, tmp_path: Path) -> None:
    run(programs / "python", "-c", IMPORT_ALL, folder=tmp_path)


@pytest.mark.parametrize("program", ["fleet", "edge-agent"])
def test_the_commands_show_their_help_with_the_least_versions(
    program: str, programs: Path, tmp_path: Path
) -> None:
    assert "COMMAND [ARGS]" in run(programs / program, "--help", folder=tmp_path)


def test_a_fleet_is_made_and_answers_with_the_least_versions(
    programs: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    home = {"FLEET_HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def fleet(*arguments: str | Path) -> str:
        return run(programs / "fleet", *arguments, folder=tmp_path, variables=home)

    model = ("--model", tiny_checkpoint, "--exits", "2", "--exit-head", "shared")
    fleet("export", *model, "--out", "bundle")
    fleet("init", "--host", "127.0.0.1", "--bundle", "bundle")
    fleet("enroll", "kitchen", "--out", "kitchen")
    output = fleet("demo", "--bundle", "bundle", "--prompt", "hi", "--max-new-tokens", "4")
    assert "1 answer" in output
