"""Keys and rights in memory: they follow the registry, and time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fleet.errors import AccessError, CredentialsError, RegistryError
from fleet.protocol.access import Role
from fleet.protocol.api_key import ApiKey
from fleet.registry.store import Registry
from fleet.server.gateway.key_access import KeyAccess
from tests.fleet.conftest import add

EXPIRES_AT = 4e9


class Clock:
    """A time that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.open(tmp_path / "registry.sqlite") as opened:
        add(opened, "kitchen")
        add(opened, "phone", Role.APP, targets=("kitchen",))
        yield opened


def test_a_key_ends_at_its_time_and_its_secret_is_compared(registry: Registry) -> None:
    clock = Clock()
    access = KeyAccess(registry, clock)
    key = registry.api_keys.create("phone", expires_at=EXPIRES_AT)
    assert access.caller(key) is None
    access.follow()
    caller = access.caller(key)
    assert caller is not None
    assert (caller.app, caller.key) == ("phone", key.id)
    assert access.caller(ApiKey(key.id, "0" * 64)) is None
    access.check(caller, "kitchen")
    with pytest.raises(AccessError, match="phone may not prompt attic any more"):
        access.check(caller, "attic")
    clock.now = EXPIRES_AT
    assert access.caller(key) is None
    with pytest.raises(CredentialsError, match="has expired"):
        access.check(caller, "kitchen")


def test_rights_stay_as_they_are_while_the_registry_is_away(
    registry: Registry, tmp_path: Path
) -> None:
    access = KeyAccess(registry)
    key = registry.api_keys.create("phone")
    access.follow()
    registry.close()
    path = tmp_path / "registry.sqlite"
    path.rename(tmp_path / "away.sqlite")
    path.mkdir()
    with pytest.raises(RegistryError):
        access.follow()
    caller = access.caller(key)
    assert caller is not None
    assert access.names(caller) == ["fleet", "kitchen"]
