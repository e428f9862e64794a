"""The packages of the images are pinned with hashes, and fit pyproject.toml."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement

from tests.deploy.files import DEPLOY, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {"server": ("server", "postgres"), "worker": ("worker",)}
IMAGES = [*EXTRAS, "build"]


def lock_text(image: str) -> str:
    return (DEPLOY / f"requirements-{image}.txt").read_text(encoding="utf-8")


def dockerfile_text() -> str:
    return (DEPLOY / "Dockerfile").read_text(encoding="utf-8")


def locked_versions(image: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==([^\s;]+)", lock_text(image), re.MULTILINE))


def direct_requirements(image: str) -> list[Requirement]:
    optional = PROJECT["optional-dependencies"]
    if image == "build":
        lines = [line for line in optional["dev"] if line.startswith(("build>", "hatchling>"))]
    else:
        extras = [line for extra in EXTRAS[image] for line in optional[extra]]
        lines = [*PROJECT["dependencies"], *extras]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("image", IMAGES)
def test_each_direct_dependency_is_pinned_to_a_version_that_pyproject_allows(image: str) -> None:
    versions = locked_versions(image)
    for requirement in direct_requirements(image):
        if requirement.name != "torch":
            assert requirement.specifier.contains(versions[requirement.name]), requirement
            for extra in requirement.extras:
                assert f"{requirement.name}-{extra}" in versions


@pytest.mark.parametrize("image", IMAGES)
def test_every_package_has_hashes_and_no_index_is_named(image: str) -> None:
    lines = [line for line in lock_text(image).splitlines() if not line.startswith("#")]
    packages = [line for line in lines if not line.startswith("    --hash=sha256:")]
    assert len(packages) == len(locked_versions(image)) > 0
    assert all(line.endswith(" \\") for line in packages)
    assert "://" not in lock_text(image)


def test_pytorch_is_pinned_by_its_version_alone_so_that_any_build_fits() -> None:
    assert not re.search(r"^(torch|nvidia|triton|cuda)", lock_text("worker"), re.MULTILINE)
    (export_pin,) = (
        line
        for line in PROJECT["optional-dependencies"]["export"]
        if Requirement(line).name == "torch"
    )
    assert f"ARG TORCH={export_pin}\n" in dockerfile_text()
    assert {"sympy", "networkx", "jinja2"} <= locked_versions("worker").keys()


def test_the_images_install_nothing_else_from_an_index() -> None:
    commands = re.findall(r"^RUN pip install (.*)$", dockerfile_text(), re.MULTILINE)
    for image in IMAGES:
        path = f"/requirements/requirements-{image}.txt"
        assert f"--no-cache-dir --require-hashes -r {path}" in commands
    others = [each for each in commands if "--require-hashes" not in each]
    assert [each for each in others if "--no-index" not in each] == ['--no-cache-dir "${TORCH}"']


def test_the_images_python_is_the_one_the_files_are_for() -> None:
    (version,) = re.findall(r"^ARG PYTHON=python:(\d+\.\d+)-", dockerfile_text(), re.MULTILINE)
    assert all(f"for Python {version}\n" in lock_text(image) for image in IMAGES)
