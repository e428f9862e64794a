"""Keys of apps for the HTTP API: their states, and the rights of their apps."""

from __future__ import annotations

import pytest

from fleet.errors import ConfigError, CredentialsError, IdentityError, StateError
from fleet.identity.enrolment import Enrolment
from fleet.protocol.access import Role
from fleet.protocol.api_key import ApiKey
from fleet.registry.identities import api_keys
from fleet.registry.store import Registry
from tests.fleet.conftest import add


@pytest.fixture
def home(registry: Registry) -> Registry:
    """Two devices, one of them in a group and with a tag, and an app that may prompt that one."""
    add(registry, "kitchen", group="home")
    add(registry, "attic")
    registry.identities.tag("kitchen", {"floor": "1"})
    add(registry, "phone", Role.APP, targets=("home",))
    return registry


def apps_of_keys(registry: Registry) -> list[str]:
    return sorted(key.app for key in registry.api_keys.rights().keys.values())


def states(registry: Registry) -> list[str]:
    return [row.state for row in registry.api_keys.all()]


def test_a_key_is_stored_as_a_hash_and_only_its_secret_has_it(home: Registry) -> None:
    key = home.api_keys.create("phone")
    stored = home.api_keys.rights().keys[key.id]
    assert key.secret not in str(stored)
    assert ApiKey.parse(f" {key}\n").has_hash(stored.secret_hash)
    assert not ApiKey(key.id, "0" * 64).has_hash(stored.secret_hash)


def test_a_text_that_is_no_key_is_refused_and_not_repeated() -> None:
    with pytest.raises(CredentialsError, match="expected fleet-") as caught:
        ApiKey.parse("sk-secret")
    assert "secret" not in str(caught.value).replace("API key", "")


def test_the_rights_of_a_key_are_those_of_its_app_as_on_mqtt(home: Registry) -> None:
    home.api_keys.create("phone")
    grants = home.identities.grants("phone")
    assert grants is not None
    assert home.api_keys.rights().devices_of == {"phone": grants.targets} == {"phone": ("kitchen",)}
    home.api_keys.create("phone", ["attic"])
    rights = home.api_keys.rights()
    assert rights.devices_of == {"phone": ("attic", "kitchen")}
    assert (rights.devices["kitchen"].group, rights.devices["kitchen"].tags) == (
        "home",
        ("floor=1",),
    )


def test_a_device_that_is_suspended_is_no_right(home: Registry) -> None:
    home.api_keys.create("phone")
    home.identities.suspend("kitchen")
    assert home.api_keys.rights().devices_of == {"phone": ()}


def test_a_new_name_with_targets_becomes_an_app_that_needs_no_certificate(home: Registry) -> None:
    home.api_keys.create("chat", ["floor=1"])
    assert home.api_keys.rights().devices_of == {"chat": ("kitchen",)}
    (row,) = (row for row in home.identities.all(Role.APP) if row.name == "chat")
    assert (row.state, row.targets) == ("pending", ("floor=1",))


@pytest.mark.parametrize(
    ("app", "targets", "words"),
    [
        ("ghost", (), "not enrolled.*--allow"),
        ("ghost", ("cellar",), "cannot allow 'cellar'"),
        ("phone", ("cellar",), "cannot allow 'cellar'"),
        ("kitchen", (), "it is a device"),
        ("home", ("attic",), "name of a group"),
    ],
)
def test_a_key_is_for_an_app_and_devices_that_exist(
    home: Registry, app: str, targets: tuple[str, ...], words: str
) -> None:
    with pytest.raises(IdentityError, match=words):
        home.api_keys.create(app, targets)
    assert home.api_keys.all() == []
    assert home.identities.grants("phone") is not None


def test_a_revoked_key_and_an_expired_one_cannot_be_used(home: Registry) -> None:
    revoked = home.api_keys.create("phone")
    home.api_keys.create("phone", expires_at=1.0)
    home.api_keys.create("phone", expires_at=9e9)
    assert home.api_keys.revoke(revoked.id) == "phone"
    assert sorted(states(home)) == ["active", "expired", "revoked"]
    assert apps_of_keys(home) == ["phone"]
    with pytest.raises(CredentialsError, match="fleet key list"):
        home.api_keys.revoke("0" * 16)


def test_the_keys_of_a_suspended_app_work_again_when_it_is_resumed(home: Registry) -> None:
    home.api_keys.create("phone")
    home.identities.suspend("phone")
    assert (apps_of_keys(home), states(home)) == ([], ["suspended"])
    with pytest.raises(StateError, match="fleet resume phone"):
        home.api_keys.create("phone")
    home.identities.resume("phone")
    assert (apps_of_keys(home), states(home)) == (["phone"], ["active"])


def test_the_keys_of_a_revoked_or_replaced_app_never_work_again(home: Registry) -> None:
    home.api_keys.create("phone")
    home.identities.revoke("phone")
    with pytest.raises(StateError, match="fleet enroll phone"):
        home.api_keys.create("phone")
    app = Enrolment(name="phone", role=Role.APP, targets=("attic",))
    home.identities.enroll([app], 60.0)
    assert (apps_of_keys(home), states(home)) == ([], ["revoked"])
    home.api_keys.create("phone")
    assert apps_of_keys(home) == ["phone"]
    home.identities.enroll([app], 60.0, replace=True)
    assert (apps_of_keys(home), states(home)) == ([], ["revoked", "revoked"])
    home.identities.revoke("phone")
    home.identities.delete("phone")
    assert states(home) == []


def test_keys_outlive_the_certificate_of_their_app(home: Registry) -> None:
    home.identities.add_identity(
        "old", Role.APP, targets=("attic",), fingerprint="1" * 64, not_after=1.0
    )
    assert home.identities.grants("old") is None
    home.api_keys.create("old")
    assert home.api_keys.rights().devices_of == {"old": ("attic",)}


def test_an_app_has_a_limited_number_of_valid_keys(
    home: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_keys, "MAX_KEYS", 1)
    home.api_keys.create("phone", expires_at=1.0)
    first = home.api_keys.create("phone")
    with pytest.raises(ConfigError, match="fleet key revoke"):
        home.api_keys.create("phone")
    home.api_keys.revoke(first.id)
    home.api_keys.create("phone")


def test_each_change_of_keys_is_in_the_audit_log_without_the_secret(home: Registry) -> None:
    key = home.api_keys.create("phone", ["attic"])
    home.api_keys.revoke(key.id)
    rows = home.audit_log.entries("phone")
    assert [row.action for row in rows] == ["key_revoke", "key_create", "allow", "enroll"]
    assert rows[0].details == {"key": key.id}
    assert key.secret not in str(rows)
