"""Who imports what: by the rules in pyproject.toml, and by looking into fresh interpreters."""

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
    ("module", "unwanted"),
    [
        ("edge_agent.serving.agent", {"torch", "transformers", "sqlalchemy", "alembic", "amqtt"}),
        ("edge_agent.cli", {"torch", "transformers", "sqlalchemy", "alembic", "amqtt"}),
        ("cloud_broker_worker.worker.worker", {"onnxruntime", "sqlalchemy"}),
        ("provisioning.offline_enrolment", {"torch", "onnxruntime"}),
        ("fleet.cli", {"torch", "transformers", "onnxruntime", "sqlalchemy", "amqtt"}),
    ],
)
def test_a_fresh_interpreter_finds_nothing_that_a_part_does_not_need(
    module: str, unwanted: set[str]
) -> None:
    looked = run(sys.executable, "-c", f"import {module}, sys; print(*sys.modules)")
    assert looked.returncode == 0, looked.stderr
    assert not unwanted & set(looked.stdout.split())


def test_the_import_contracts_hold() -> None:
    linted = run(str(Path(sys.executable).parent / "lint-imports"), "--no-cache")
    assert linted.returncode == 0, linted.stdout + linted.stderr
