"""Fixtures of the tests of `fleet`: a registry on each database, and reproducible fuzzing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from fleet.protocol.access import Role
from fleet.protocol.report import GenerationReport
from fleet.registry.store import Registry

# The same examples on every run: a failure can be reproduced.
settings.register_profile("fleet", deadline=None, derandomize=True, max_examples=300)
settings.load_profile("fleet")


@pytest.fixture
def registry(registry_url: str) -> Iterator[Registry]:
    with Registry.open(registry_url) as opened:
        yield opened


def add(
    registry: Registry,
    name: str,
    role: Role = Role.DEVICE,
    group: str | None = None,
    targets: tuple[str, ...] = (),
) -> None:
    """Enrol an identity without a certificate."""
    registry.identities.add_identity(
        name, role, group, targets, fingerprint="0" * 64, not_after=2e9
    )


def report(generation: str = "g1", **changes: object) -> GenerationReport:
    """Return a report of 10 tokens: 5 from exit 8, 2 from exit 15, 2 from the cloud, 1 fallback."""
    values: dict[str, object] = {
        "generation": generation,
        "app": "app-1",
        "request": "r1",
        "session": "s1",
        "worker": "worker-1",
        "bundle_id": "b1",
        "mode": "collaborative",
        "started_at": 1000.0,
        "prompt_tokens": 7,
        "tokens": 10,
        "sources": {"cloud": 2, "exit:15": 2, "fallback": 1, "exit:8": 5},
        "assists": 3,
        "bytes_up": 2000,
        "bytes_down": 300,
        "ttft_ms": 20.0,
        "tpot_ms": 5.0,
        "finish_reason": "stop",
    }
    return GenerationReport(**values | changes)  # type: ignore[arg-type]
