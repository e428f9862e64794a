"""Lists that are read in parts, on each database."""

from __future__ import annotations

import time

import pytest

from fleet.errors import ConfigError, UnknownDeviceError
from fleet.identity.enrolment import Enrolment
from fleet.protocol.access import Role
from fleet.protocol.desired_config import Settings
from fleet.registry.rollouts.plan import RolloutPlan
from fleet.registry.rollouts.states import RolloutEvent
from fleet.registry.store import Registry
from fleet.registry.targets import Scope, Target
from tests.fleet.conftest import add, report

KITCHEN = Target(Scope.DEVICE, "kitchen")


@pytest.fixture(autouse=True)
def devices(registry: Registry) -> None:
    add(registry, "kitchen", group="house")
    add(registry, "attic")
    add(registry, "phone", Role.APP, targets=("kitchen",))


def test_sessions_continue_after_one_also_where_several_began_at_once(registry: Registry) -> None:
    for i, started_at in enumerate((1000.0, 1000.0, 1000.0, 1000.125)):
        registry.stats.record_report(
            "kitchen", report(f"g{i}", session=f"s{i}", started_at=started_at)
        )
    names: list[str] = []
    before: tuple[float, int] | None = None
    while page := registry.stats.numbered_sessions("kitchen", 1, before=before):
        ((number, row),) = page.items()
        names.append(row.session)
        before = (row.opened_at, number)
    assert names == [row.session for row in registry.stats.sessions()] == ["s3", "s2", "s1", "s0"]


def test_changes_and_roll_outs_continue_below_a_number(registry: Registry) -> None:
    changes = registry.audit_log.numbered_entries(limit=10)
    newest, *others = changes
    assert list(registry.audit_log.numbered_entries(before=newest)) == others
    registry.rollouts.add_bundle("b" * 32, "tiny", 10)
    for _ in range(3):
        number = registry.rollouts.start("bbbb", RolloutPlan())
        registry.rollouts.change(number, RolloutEvent.UNDO)
    assert [row.id for row in registry.rollouts.latest(limit=1, before=3)] == [2]


def test_a_token_is_listed_until_it_is_used_or_has_ended(registry: Registry) -> None:
    tokens = registry.identities.enroll([Enrolment(name="new"), Enrolment(name="later")], 900.0)
    registry.identities.enroll([Enrolment(name="over")], -1.0)
    rows = registry.identities.open_tokens()
    assert [(row.id, row.name, row.role) for row in rows] == [
        (token.id, token.name, "device") for token in tokens
    ]
    assert all(row.created_at <= time.time() < row.expires_at for row in rows)


def test_one_identity_has_its_rights_and_labels(registry: Registry) -> None:
    registry.identities.tag("kitchen", {"floor": "1"})
    rows = {row.name: row for row in registry.identities.all()}
    for name in ("kitchen", "phone"):
        assert registry.identities.get(name) == rows[name]
    with pytest.raises(UnknownDeviceError):
        registry.identities.get("oven")


def test_the_scopes_of_a_device_are_those_of_all_its_group_and_itself(registry: Registry) -> None:
    for target, top_k in ((Target(Scope.ALL), 1), (Target(Scope.GROUP, "house"), 2)):
        registry.desired_state.change_settings(target, lambda _, k=top_k: Settings(top_k=k))  # type: ignore[misc]
    scopes = registry.desired_state.scopes("kitchen")
    assert [(str(target), each.settings.top_k) for target, each in scopes.items()] == [
        ("all", 1),
        ("group:house", 2),
        ("device:kitchen", None),
    ]
    assert list(registry.desired_state.scopes("attic")) == [
        Target(Scope.ALL),
        Target(Scope.DEVICE, "attic"),
    ]
    with pytest.raises(UnknownDeviceError):
        registry.desired_state.scopes("phone")


def test_settings_change_from_the_version_that_was_seen(registry: Registry) -> None:
    state = registry.desired_state
    version = state.change_settings(KITCHEN, lambda _: Settings(top_k=1), if_version=0)
    assert state.newest(KITCHEN) == (version, Settings(top_k=1))
    with pytest.raises(ConfigError, match=f"have version {version}, expected 0"):
        state.change_settings(KITCHEN, lambda _: Settings(top_k=2), if_version=0)
    assert state.settings(KITCHEN) == Settings(top_k=1)


def test_another_actor_changes_the_same_database(registry: Registry) -> None:
    registry.acting_as("mia").identities.suspend("kitchen")
    (row,) = registry.audit_log.entries(limit=1)
    assert (row.actor, row.action, row.subject) == ("mia", "suspend", "kitchen")
