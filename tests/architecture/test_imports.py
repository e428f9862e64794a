"""Imports: the contracts in pyproject.toml, and the modules of a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TIMEOUT_S = 120


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("fleet", {"torch", "msgspec", "paho", "fleet.public"}),
        ("edge_agent", {"torch", "onnxruntime", "msgspec"}),
        ("fleet.public", {"torch", "onnxruntime", "sqlalchemy", "edge_agent.serving"}),
        ("edge_agent.serving.agent", {"torch", "transformers", "sqlalchemy", "alembic"}),
        ("edge_agent.cli", {"torch", "transformers", "sqlalchemy", "alembic"}),
        ("cloud_broker_worker.worker.worker", {"onnxruntime", "sqlalchemy"}),
        ("provisioning.offline_enrolment", {"torch", "onnxruntime"}),
        ("fleet.cli", {"torch", "transformers", "onnxruntime", "sqlalchemy"}),
    ],
)
def test_a_program_imports_nothing_that_it_does_not_need(module: str, forbidden: set[str]) -> None:
    process = run(sys.executable, "-c", f"import {module}, sys; print(*sys.modules)")
    assert process.returncode == 0, process.stderr
    assert not forbidden & set(process.stdout.split())


def test_the_import_contracts_hold() -> None:
    process = run(str(Path(sys.executable).parent / "lint-imports"), "--no-cache")
    assert process.returncode == 0, process.stdout + process.stderr
