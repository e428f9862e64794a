"""Which certificates count, which belong on a revocation list, and which devices are denied; on both databases."""

from __future__ import annotations

import threading
import time
from typing import Final

import pytest
from sqlalchemy import update

from fleet.protocol import topics
from fleet.protocol.access import Role
from fleet.protocol.denylist import decode_denylist
from fleet.registry.identities.states import IdentityState
from fleet.registry.models import AllowedTarget, CertificateRecord, IdentityRecord, TagRecord
from fleet.registry.store import Registry
from fleet.server.denylist_publisher import DenylistPublisher
from fleet.transport.in_memory import InMemoryBroker
from tests.brokers import Inbox
from tests.fleet.conftest import add

NEWEST: Final = "0" * 64  # what `add` says
OLDER: Final = "a" * 64
NOW: Final = time.time()


def keep(
    registry: Registry, name: str, serial: str, fingerprint: str, not_after: float = NOW + 1000
) -> None:
    """A certificate in the table."""
    row = CertificateRecord(
        serial=serial,
        name=name,
        fingerprint=fingerprint,
        key_hash="",
        pem="",
        not_before=0.0,
        not_after=not_after,
    )
    registry._transactions.write(lambda db: db.add(row))


def set_identity(registry: Registry, name: str, **values: object) -> None:
    change = update(IdentityRecord).where(IdentityRecord.name == name).values(**values)
    registry._transactions.write(lambda db: db.execute(change))


def test_the_newest_certificate_counts_and_one_that_nobody_knows_does_not(
    registry: Registry,
) -> None:
    add(registry, "d1")
    assert registry.knows_certificate("d1", NEWEST)
    assert not registry.knows_certificate("d1", OLDER)
    assert not registry.knows_certificate("d2", NEWEST)


def test_an_earlier_certificate_counts_until_it_is_revoked(registry: Registry) -> None:
    add(registry, "d1")
    keep(registry, "d1", "1", OLDER)
    assert registry.knows_certificate("d1", OLDER)
    registry.revoke("d1")
    assert not registry.knows_certificate("d1", OLDER)


def test_the_newest_certificate_does_not_count_once_it_is_revoked(registry: Registry) -> None:
    add(registry, "d1")
    keep(registry, "d1", "1", NEWEST)
    registry.revoke("d1")
    set_identity(registry, "d1", state=IdentityState.ACTIVE)
    assert not registry.knows_certificate("d1", NEWEST)
    assert registry.admitted("d1", NEWEST) is None


def test_another_names_certificate_does_not_count(registry: Registry) -> None:
    add(registry, "d1")
    set_identity(registry, "d1", fingerprint=OLDER)
    add(registry, "d2")
    assert not registry.knows_certificate("d2", OLDER)


def test_who_has_no_certificate_yet_is_known_by_none(registry: Registry) -> None:
    add(registry, "d1")
    set_identity(registry, "d1", state=IdentityState.PENDING, fingerprint="", not_after=0.0)
    assert not registry.knows_certificate("d1", "")


@pytest.mark.parametrize(
    "state", [IdentityState.PENDING, IdentityState.SUSPENDED, IdentityState.REVOKED]
)
def test_a_good_certificate_admits_nobody_who_is_not_active(
    registry: Registry, state: IdentityState
) -> None:
    add(registry, "d1")
    assert registry.admitted("d1", NEWEST) is not None
    set_identity(registry, "d1", state=state)
    assert registry.admitted("d1", NEWEST) is None


def test_the_revocation_list_names_what_was_revoked_and_what_is_on_hold_and_has_not_ended(
    registry: Registry,
) -> None:
    for name in ("active", "held", "out"):
        add(registry, name)
        keep(registry, name, f"{len(name):x}", f"{name:0>64}")
    keep(registry, "out", "e0", "e" * 64, not_after=NOW - 1)
    registry.suspend("held")
    registry.revoke("out")
    listed = {
        row.serial: (row.name, row.revoked_at is None) for row in registry.revoked_certificates()
    }
    assert listed == {"4": ("held", True), "3": ("out", False)}


def test_who_is_resumed_leaves_the_revocation_list(registry: Registry) -> None:
    add(registry, "d1")
    keep(registry, "d1", "1", OLDER)
    registry.suspend("d1")
    assert registry.revoked_certificates() != []
    registry.resume("d1")
    assert registry.revoked_certificates() == []


def test_a_revoked_certificate_stays_on_the_list_when_its_name_is_enrolled_again(
    registry: Registry,
) -> None:
    add(registry, "d1")
    keep(registry, "d1", "1", OLDER)
    registry.revoke("d1")
    set_identity(registry, "d1", state=IdentityState.ACTIVE, fingerprint=NEWEST)
    assert [row.serial for row in registry.revoked_certificates()] == ["1"]


def test_denied_are_devices_that_are_suspended_revoked_or_expired(registry: Registry) -> None:
    for name in ("active", "expired", "held", "out", "waiting"):
        add(registry, name)
    add(registry, "app", Role.APP)
    registry.revoke("app")
    registry.suspend("held")
    registry.revoke("out")
    set_identity(registry, "expired", not_after=NOW - 1)
    set_identity(registry, "waiting", state=IdentityState.PENDING, not_after=0.0)
    assert set(registry.denied()) == {"expired", "held", "out"}


def test_of_too_many_denied_those_stay_whose_certificates_live_longest(registry: Registry) -> None:
    for i in range(4):
        add(registry, f"d{i}")
        set_identity(registry, f"d{i}", state=IdentityState.REVOKED, not_after=1000.0 + i)
    assert registry.denied(limit=2) == ["d3", "d2"]


def test_everybodys_rights_are_those_of_who_is_active(registry: Registry) -> None:
    add(registry, "d1")
    add(registry, "d2")
    add(registry, "hub", Role.SERVER)
    set_identity(registry, "d2", state=IdentityState.SUSPENDED)
    assert registry.all_grants() == [registry.grants("d1"), registry.grants("hub")]


def test_everybodys_rights_resolve_names_groups_and_tags_both_ways(registry: Registry) -> None:
    add(registry, "d1", group="lab")
    add(registry, "d2", group="lab")
    add(registry, "d3")
    registry._transactions.write(lambda db: db.add(TagRecord(device="d3", key="floor", value="1")))
    add(registry, "by-group", Role.APP, targets=("lab", "d1"))
    add(registry, "by-tag", Role.APP)
    registry._transactions.write(lambda db: db.add(AllowedTarget(app="by-tag", target="floor=1")))
    assert {grants.name: grants.targets for grants in registry.all_grants()} == {
        "by-group": ("d1", "d2"),
        "by-tag": ("d3",),
        "d1": ("by-group",),
        "d2": ("by-group",),
        "d3": ("by-tag",),
    }


def test_workers_are_told_who_is_denied_when_it_changes_and_when_the_link_comes_back(
    registry: Registry,
) -> None:
    add(registry, "d1")
    broker = InMemoryBroker()
    inbox = Inbox()
    with broker.connect("hub") as server, broker.connect("w1") as worker:
        worker.subscribe(topics.REVOKED, inbox)
        denials = DenylistPublisher(server, registry)
        again = threading.Semaphore(0)
        server.on_up(again.release)  # as the server does, which has the watcher run its tasks then
        assert again.acquire(timeout=10)
        denials.publish()
        denials.publish()
        registry.revoke("d1")
        denials.publish()
        server.drop()
        server.restore()
        assert again.acquire(timeout=10)
        denials.publish()
        told = [decode_denylist(inbox.get()[1]) for _ in range(3)]
    assert told == [frozenset(), {"d1"}, {"d1"}]
    assert inbox.is_empty
