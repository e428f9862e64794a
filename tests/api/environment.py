"""An environment with the packages that people use as clients."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import uv

from tests.packaging.environments import run

REQUIREMENTS: Final = Path(__file__).with_name("requirements.txt")
CALLS: Final = Path(__file__).with_name("client_calls.py")


@pytest.fixture(scope="session")
def client_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment with the clients."""
    folder = tmp_path_factory.mktemp("clients")
    python = folder / "venv" / "bin" / "python"
    program = uv.find_uv_bin()
    run(program, "venv", "--quiet", "--python", sys.executable, folder / "venv", folder=folder)
    install = (program, "pip", "install", "--quiet", "--python", python)
    run(*install, "-r", REQUIREMENTS, folder=folder)
    return python


def call_clients(python: Path, url: str, model: str, key: str) -> dict[str, Any]:
    """The values of all calls of the clients, by the names of the calls."""
    variables = {"PYTHONPATH": "", "PYTHONWARNINGS": "ignore"}
    output = run(python, CALLS, url, model, key, folder=python.parent, variables=variables)
    values: dict[str, Any] = json.loads(output.splitlines()[-1])
    return values
