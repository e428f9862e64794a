"""Write the packages of the images in deploy/, pinned with hashes; run it in .venv.

The versions are those of this environment, which the tests ran on. PyTorch is not in the files: its
builds for CPU and GPU have the same version, other hashes and other packages, and come from
different indexes. The Dockerfile installs it by version.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Final

import uv

ROOT: Final = Path(__file__).resolve().parent.parent
PYTHON_VERSION: Final = "3.12"
"""The version of the images; the Dockerfile's PYTHON has the same."""

IMAGE_EXTRAS: Final = {"server": ("server", "postgres"), "worker": ("worker",)}
BUILD_PACKAGES: Final = ("build", "hatchling")
TORCH_PACKAGES: Final = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)==")
"""PyTorch, and the packages that only its builds for GPUs need."""

HEADER: Final = "# Made by scripts/lock_dependencies.py; {}\n"


def main() -> None:
    """Write a file for each image, and one for the packages that build the wheel."""
    for image, extras in IMAGE_EXTRAS.items():
        write_lock(image, project_requirements(extras))
    write_lock("build", [line for line in dev_requirements() if is_for_building(line)])


def project_requirements(extras: tuple[str, ...]) -> list[str]:
    """Return the requirements of the project with some extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    return [*project["dependencies"], *(line for extra in extras for line in optional[extra])]


def dev_requirements() -> list[str]:
    return project_requirements(("dev",))


def is_for_building(requirement: str) -> bool:
    return re.split("[^a-z0-9-]", requirement)[0] in BUILD_PACKAGES


def write_lock(name: str, requirements: list[str]) -> None:
    """Resolve requirements and write deploy/requirements-`name`.txt."""
    blocks = [block for block in resolve(requirements) if not TORCH_PACKAGES.match(block)]
    path = ROOT / "deploy" / f"requirements-{name}.txt"
    path.write_text(HEADER.format(f"for Python {PYTHON_VERSION}") + "".join(blocks), "utf-8")
    print(f"{path.relative_to(ROOT)}: {len(blocks)} packages")


def resolve(requirements: list[str]) -> list[str]:
    """Return each package as its lines in a file of requirements, with the hashes."""
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(installed_versions()), "utf-8")
        command = [uv.find_uv_bin(), "pip", "compile", "-", "--quiet", "--universal"]
        command += ["--python-version", PYTHON_VERSION, "--generate-hashes"]
        command += ["--no-header", "--no-annotate", "--constraint", str(constraints)]
        process = subprocess.run(
            command,
            input="\n".join(requirements),
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
    if process.returncode:
        sys.exit("the packages were not resolved; see above")
    return re.findall(r"^\S.*\n(?:[ ].*\n)*", process.stdout, re.MULTILINE)


def installed_versions() -> list[str]:
    """Return a constraint for each package of this environment, without the build of PyTorch."""
    return [
        f"{package.name}=={package.version.partition('+')[0]}"
        for package in importlib.metadata.distributions()
        if package.name != "cecollm-fleet"
    ]


if __name__ == "__main__":
    main()
