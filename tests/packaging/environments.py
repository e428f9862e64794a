"""Fresh environments with this project: the newest versions of its packages, or the least."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import uv

ROOT: Final = Path(__file__).parent.parent.parent
TIMEOUT_S: Final = 400


def run(
    *command: str | Path,
    folder: Path,
    variables: Mapping[str, str] | None = None,
    text: str | None = None,
) -> str:
    """Return the output of a command, whose input is `text`.

    The test fails with its error output when it fails.
    """
    process = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | dict(variables or {}),
        input=text,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def build_project_wheel(folder: Path) -> Path:
    """Build the wheel of this tree into `folder`."""
    build: list[str | Path] = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    run(*build, "--outdir", folder, ROOT, folder=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install_newest(folder: Path, requirement: str) -> Path:
    """Install the newest versions that fit into `folder`/venv; return its folder of programs."""
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", folder=folder)
    programs = folder / "venv" / "bin"
    # Few of the modules are imported, so compiling all of them takes longer than the tests.
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", programs / "python"]
    install = ("install", "--quiet", "--disable-pip-version-check", "--no-compile")
    run(*pip, *install, requirement, folder=folder)
    return programs


def install_beside(folder: Path, requirement: str) -> Path:
    """Install the newest version that fits beside the packages of this environment, which it
    replaces; return the new environment's Python.
    """
    python = folder / "venv" / "bin" / "python"
    program = uv.find_uv_bin()
    run(program, "venv", "--quiet", "--python", sys.executable, folder / "venv", folder=folder)
    (packages,) = (folder / "venv").glob("lib/*/site-packages")
    (packages / "beside.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", python]
    install = ("install", "--upgrade", "--quiet", "--disable-pip-version-check", "--no-compile")
    run(*pip, *install, requirement, folder=folder)
    return python


def install_lowest(folder: Path, requirement: str) -> Path:
    """Install the least versions that fit into `folder`/venv; return its folder of programs.

    PyTorch is the build that runs these tests: another one would be a download of gigabytes.
    """
    python = folder / "venv" / "bin" / "python"
    program = uv.find_uv_bin()
    run(program, "venv", "--quiet", "--python", sys.executable, folder / "venv", folder=folder)
    constraints = folder / "constraints.txt"
    torch_version = importlib.metadata.version("torch")
    constraints.write_text(f"torch=={torch_version}\n", encoding="utf-8")
    install: list[str | Path] = [program, "pip", "install", "--quiet", "--python", python]
    install += ["-c", constraints]
    for place in os.environ.get("PIP_FIND_LINKS", "").split():
        install += ["--find-links", place]
    wheel, _, extras = requirement.rstrip("]").partition("[")
    # Dependencies of a wheel are not direct ones to uv, those of the project's file are.
    install += ["--resolution", "lowest-direct", "-r", ROOT / "pyproject.toml"]
    run(*install, *(f"--extra={extra}" for extra in extras.split(",")), folder=folder)
    run(program, "pip", "install", "-q", "--python", python, "--no-deps", wheel, folder=folder)
    return python.parent
