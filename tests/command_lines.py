"""Command lines in the process of the tests; a process of its own takes a second of CPU time."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from subprocess import CompletedProcess
from typing import Final

import pytest

import cloud_broker_worker.worker.cli
import edge_agent.cli
import fleet.cli

PROGRAMS: Final[dict[str, Callable[[], None]]] = {
    "fleet.cli": fleet.cli.main,
    "edge_agent": edge_agent.cli.main,
    "cloud_broker_worker": cloud_broker_worker.worker.cli.main,
}


def run(*arguments: str, module: str = "fleet.cli", **environment: str) -> CompletedProcess[str]:
    """Run a command line of a module; an error that the command does not expect is raised."""
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(io.StringIO()) as output,
        redirect_stderr(io.StringIO()) as errors,
    ):
        patch.setattr(sys, "argv", [module, *arguments])
        patch.setattr(logging.root, "handlers", [])
        patch.setattr(logging.root, "level", logging.root.level)
        for name, value in environment.items():
            patch.setenv(name, value)
        status = _status(PROGRAMS[module])
    return CompletedProcess(arguments, status, output.getvalue(), errors.getvalue())


def _status(program: Callable[[], None]) -> int:
    try:
        program()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0
