"""The unit of a device, with its HTTP API."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.device_unit import device_unit
from fleet.errors import ConfigError
from tests.brokers import Site


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An identity folder of a device."""
    return Site("embedded", tmp_path).identity("d1").folder


def test_a_unit_starts_the_api_of_its_device(folder: Path) -> None:
    keys = Path("/home/operator/keys")
    unit = device_unit(folder, "fleet", "0.0.0.0", keys)
    assert f"run {folder} --api-key-file {keys} --api 0.0.0.0:11434" in unit
    assert "BindReadOnlyPaths=/home/operator/keys" in unit


def test_no_unit_opens_the_api_of_its_device_without_a_key(folder: Path) -> None:
    assert "--api 127.0.0.1:80" in device_unit(folder, "fleet", "127.0.0.1:80")
    with pytest.raises(ConfigError, match="--api-key-file"):
        device_unit(folder, "fleet", "0.0.0.0:80")
