"""A fleet in this process: its start, its parts, its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.config import AgentConfig
from fleet.bundles.manifest import Bundle, Manifest
from fleet.errors import BundleError, LinkError, PromptError
from fleet.protocol import topics
from fleet.server import local_fleet
from fleet.server.local_fleet import DEVICE, WORKER, LocalFleet


def test_a_fleet_that_does_not_run_says_so(tiny_bundle: Bundle) -> None:
    fleet = LocalFleet(tiny_bundle)
    with pytest.raises(PromptError, match=r"does not run; use 'with .* or call start\(\)"):
        fleet.generate("hello")
    assert fleet.start().generate("hello", mode="verified", max_new_tokens=2).usage.tokens == 2
    fleet.close()
    with pytest.raises(PromptError, match="does not run"):
        fleet.generate("hello")
    with fleet:
        assert fleet.generate("hello", max_new_tokens=1).usage.tokens == 1


def test_a_bundle_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="got 'nonsense'"), LocalFleet("nonsense"):
        pass
    with pytest.raises(BundleError, match="no usable bundle"), LocalFleet(tmp_path):
        pass


def test_a_bundle_without_a_half_for_the_cloud_needs_no_worker(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Manifest, "is_device_only", True)
    config = AgentConfig(num_threads=1, max_concurrent_requests=2)
    with LocalFleet(tiny_bundle, config) as fleet:
        assert fleet.max_at_once == 2
        assert topics.device_status(DEVICE) in fleet.broker._retained
        assert topics.worker_status(WORKER) not in fleet.broker._retained


class DeafFleet(LocalFleet):
    """A fleet that misses the status of its device."""

    def _on_device_status(self, topic: str, payload: bytes) -> None:
        pass


def test_a_part_that_does_not_come_online_is_reported(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_fleet, "START_S", 0.0)
    with DeafFleet(None) as fleet, pytest.raises(LinkError, match=f"{DEVICE} is not online"):
        fleet.start_device(tiny_bundle, AgentConfig(num_threads=1))
