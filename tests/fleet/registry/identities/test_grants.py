"""Grants: the devices that an app may prompt, and the apps whose events a device receives."""

from __future__ import annotations

import pytest

from fleet.errors import IdentityError, UnknownDeviceError
from fleet.protocol.access import Action, Role
from fleet.registry.store import Registry
from tests.fleet.conftest import add


@pytest.fixture
def home(registry: Registry) -> Registry:
    """Two devices, one of them in a group, and two apps without grants."""
    add(registry, "kitchen", group="home")
    add(registry, "attic")
    add(registry, "phone", Role.APP)
    add(registry, "sensor", Role.APP)
    return registry


def targets(registry: Registry, name: str) -> tuple[str, ...]:
    grants = registry.identities.grants(name)
    assert grants is not None
    return grants.targets


@pytest.mark.parametrize("target", ["kitchen", "home", "floor=1"])
def test_an_app_may_prompt_devices_allowed_by_name_group_or_tag(
    home: Registry, target: str
) -> None:
    home.identities.tag("kitchen", {"floor": "1"})
    home.identities.allow("phone", [target])
    assert targets(home, "phone") == ("kitchen",)


@pytest.mark.parametrize("target", ["kitchen", "home", "floor=1"])
def test_a_device_receives_the_events_of_the_apps_that_may_prompt_it(
    home: Registry, target: str
) -> None:
    home.identities.tag("kitchen", {"floor": "1"})
    home.identities.allow("sensor", [target])
    grants = home.identities.grants("kitchen")
    assert grants is not None
    assert grants.permits(Action.SUBSCRIBE, "ce/v1/e/sensor/+")
    assert not grants.permits(Action.SUBSCRIBE, "ce/v1/e/phone/+")
    assert targets(home, "attic") == ()


def test_a_device_that_was_allowed_several_ways_is_listed_once(home: Registry) -> None:
    home.identities.tag("kitchen", {"floor": "1"})
    home.identities.allow("phone", ["kitchen", "home", "floor=1"])
    assert (targets(home, "phone"), targets(home, "kitchen")) == (("kitchen",), ("phone",))


def test_a_tag_allows_the_devices_that_get_it_later(home: Registry) -> None:
    home.identities.allow("phone", ["floor=1"])
    assert targets(home, "phone") == ()
    home.identities.tag("attic", {"floor": "1"})
    assert targets(home, "phone") == ("attic",)


def test_another_value_of_a_tag_is_another_tag(home: Registry) -> None:
    home.identities.allow("phone", ["floor=1"])
    home.identities.tag("kitchen", {"floor": "1"})
    home.identities.tag("kitchen", {"floor": "2"})
    assert targets(home, "phone") == ()
    assert {row.device: row.tags for row in home.stats.devices()} == {
        "attic": {},
        "kitchen": {"floor": "2"},
    }


def test_a_removed_tag_allows_no_app(home: Registry) -> None:
    home.identities.tag("kitchen", {"floor": "1", "wing": "east"})
    home.identities.allow("phone", ["floor=1"])
    with pytest.raises(IdentityError, match="has no tag never-there; it has floor, wing"):
        home.identities.tag("kitchen", {}, remove=["floor", "never-there"])
    home.identities.tag("kitchen", {}, remove=["floor"])
    assert (targets(home, "phone"), targets(home, "kitchen")) == ((), ())


def test_a_withdrawn_target_is_not_allowed_any_more(home: Registry) -> None:
    home.identities.allow("phone", ["home", "attic"])
    home.identities.disallow("phone", ["home"])
    assert (targets(home, "phone"), targets(home, "kitchen")) == (("attic",), ())


def test_allowing_twice_is_allowing_once(home: Registry) -> None:
    home.identities.allow("phone", ["attic", "attic"])
    home.identities.allow("phone", ["attic"])
    home.identities.disallow("phone", ["attic"])
    assert targets(home, "phone") == ()


def test_a_new_app_may_be_allowed_a_tag(home: Registry) -> None:
    add(home, "display", Role.APP, targets=("floor=1",))
    home.identities.tag("attic", {"floor": "1"})
    assert targets(home, "display") == ("attic",)


@pytest.mark.parametrize(
    "target", ["cellar", "phone", "floor=", "=1", "Floor=1", "floor=1=2", "floor=a b"]
)
def test_a_target_that_is_neither_device_nor_group_nor_tag_cannot_be_allowed(
    home: Registry, target: str
) -> None:
    with pytest.raises(IdentityError, match="cannot allow"):
        home.identities.allow("phone", ["attic", target])
    assert targets(home, "phone") == ()


@pytest.mark.parametrize("app", ["stranger", "kitchen"])
def test_only_an_app_can_be_allowed_targets(home: Registry, app: str) -> None:
    with pytest.raises(IdentityError, match=f"expected the name of an app, got '{app}'"):
        home.identities.allow(app, ["attic"])
    with pytest.raises(IdentityError, match="expected the name of an app"):
        home.identities.disallow(app, ["attic"])


def test_a_target_that_was_never_allowed_cannot_be_withdrawn(home: Registry) -> None:
    home.identities.allow("phone", ["attic"])
    with pytest.raises(IdentityError, match="was not allowed kitchen; it was allowed attic"):
        home.identities.disallow("phone", ["kitchen"])


def test_only_a_device_has_tags(home: Registry) -> None:
    with pytest.raises(UnknownDeviceError, match="unknown device 'phone'"):
        home.identities.tag("phone", {"floor": "1"})


def test_each_change_is_in_the_audit_log(home: Registry) -> None:
    home.identities.tag("kitchen", {"floor": "1"})
    home.identities.allow("phone", ["floor=1"])
    home.identities.disallow("phone", ["floor=1"])
    home.identities.tag("kitchen", {}, remove=["floor"])
    assert [(row.action, row.subject, row.details) for row in home.audit_log.entries(limit=4)] == [
        ("tag", "kitchen", {"tags": {}, "removed": ["floor"]}),
        ("disallow", "phone", {"targets": ["floor=1"]}),
        ("allow", "phone", {"targets": ["floor=1"]}),
        ("tag", "kitchen", {"tags": {"floor": "1"}, "removed": []}),
    ]


def test_a_refused_change_leaves_no_line_in_the_audit_log(home: Registry) -> None:
    before = home.audit_log.newest_change()
    with pytest.raises(IdentityError):
        home.identities.allow("phone", ["cellar"])
    assert home.audit_log.newest_change() == before


def test_a_new_device_does_not_get_the_rights_on_a_former_group_of_its_name(
    home: Registry,
) -> None:
    home.identities.allow("phone", ["home"])
    home.identities.revoke("kitchen")
    home.identities.delete("kitchen")
    with pytest.raises(IdentityError, match=r"still allowed to phone; .*fleet disallow APP home"):
        add(home, "home")
    home.identities.disallow("phone", ["home"])
    add(home, "home")
    assert targets(home, "phone") == ()
