"""`fleet key`, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from fleet.cli.keys import create_key, list_keys, revoke_api_key
from fleet.errors import ConfigError
from fleet.protocol.access import Role
from fleet.protocol.api_key import ApiKey
from fleet.server.home import FleetConfig, FleetHome
from tests.fleet.conftest import add


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet's folder: a device, and an app that may prompt it."""
    folder = tmp_path_factory.mktemp("keys") / "fleet"
    config = FleetConfig(host="127.0.0.1", port=1, bundle="/no/bundle")
    with FleetHome.create(folder, config).registry() as registry:
        add(registry, "kitchen")
        add(registry, "phone", Role.APP, targets=("kitchen",))
    return folder


def output(capsys: pytest.CaptureFixture[str]) -> Any:
    return msgspec.json.decode(capsys.readouterr().out)


def test_a_key_is_shown_once_listed_without_its_secret_and_revoked(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    create_key("phone", expires="90d", folder=home, as_json=True)
    created = output(capsys)
    key = ApiKey.parse(created["key"])
    assert (created["id"], created["app"]) == (key.id, "phone")
    list_keys("phone", folder=home, as_json=True)
    (row,) = output(capsys)
    assert (row["id"], row["state"], row["expires_at"]) == (key.id, "active", created["expires_at"])
    revoke_api_key(key.id, folder=home)
    assert capsys.readouterr().out == f"key {key.id} of phone is revoked\n"
    list_keys(folder=home)
    table = capsys.readouterr().out
    assert key.id in table
    assert "revoked" in table
    assert key.secret not in table


def test_a_new_app_gets_its_devices_with_its_first_key(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    create_key("chat", allow=["kitchen"], folder=home)
    line, key = capsys.readouterr().out.strip().splitlines()
    assert line == "chat may use this key until it is revoked; it is not shown again:"
    ApiKey.parse(key)
    list_keys("ghost", folder=home)
    assert "fleet key create APP" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("phone", {"expires": "soon"}, "expires 'soon': expected a span like 15m, 24h or 7d"),
        ("phone", {"expires": "0s"}, "expires '0s'"),
        ("phone", {"expires": "4000d"}, "at most 3650d"),
        ("operator-1", {"allow": ["kitchen"]}, "a name of the fleet's own"),
    ],
)
def test_a_lifetime_has_bounds_and_the_fleets_own_names_get_no_key(
    home: Path, name: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        create_key(name, folder=home, **changes)
