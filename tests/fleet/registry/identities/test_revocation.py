"""Valid certificates, the revocation list, and denied devices, on both databases."""

from __future__ import annotations

import threading
import time
from typing import Final

import pytest
from sqlalchemy import update

from fleet.protocol import topics
from fleet.protocol.access import Role
from fleet.protocol.denylist import decode_denylist
from fleet.registry.identities.grants import FEW
from fleet.registry.identities.lifecycle import IdentityState
from fleet.registry.models import AllowedTarget, CertificateRecord, IdentityRecord, TagRecord
from fleet.registry.store import Registry
from fleet.server.denylist_publisher import DenylistPublisher
from fleet.transport.in_memory import InMemoryBroker
from tests.brokers import WAIT_S, Inbox
from tests.fleet.conftest import add

NEWEST: Final = "0" * 64  # of the identities that `add` enrols
OLDER: Final = "a" * 64
NOW: Final = time.time()


def keep(
    registry: Registry, name: str, serial: str, fingerprint: str, not_after: float = NOW + 86_400
) -> None:
    """Store a certificate."""
    row = CertificateRecord(
        serial=serial,
        name=name,
        fingerprint=fingerprint,
        key_hash="",
        pem="",
        not_before=0.0,
        not_after=not_after,
    )
    registry.identities._transactions.write(lambda db: db.add(row))


def set_identity(registry: Registry, name: str, **values: object) -> None:
    change = update(IdentityRecord).where(IdentityRecord.name == name).values(**values)
    registry.identities._transactions.write(lambda db: db.execute(change))


def test_the_newest_certificate_is_valid_and_an_unknown_one_is_not(
    registry: Registry,
) -> None:
    add(registry, "d1")
    assert registry.identities.knows_certificate("d1", NEWEST)
    assert not registry.identities.knows_certificate("d1", OLDER)
    assert not registry.identities.knows_certificate("d2", NEWEST)


def test_an_earlier_certificate_is_valid_until_it_is_revoked(registry: Registry) -> None:
    add(registry, "d1")
    keep(registry, "d1", "1", OLDER)
    assert registry.identities.knows_certificate("d1", OLDER)
    registry.identities.revoke("d1")
    assert not registry.identities.knows_certificate("d1", OLDER)


def test_the_newest_certificate_is_not_valid_once_it_is_revoked(registry: Registry) -> None:
    add(registry, "d1")
    keep(registry, "d1", "1", NEWEST)
    registry.identities.revoke("d1")
    set_identity(registry, "d1", state=IdentityState.ACTIVE)
    assert not registry.identities.knows_certificate("d1", NEWEST)
    assert registry.identities.admitted("d1", NEWEST) is None


def test_the_certificate_of_another_name_is_not_valid(registry: Registry) -> None:
    add(registry, "d1")
    set_identity(registry, "d1", fingerprint=OLDER)
    add(registry, "d2")
    assert not registry.identities.knows_certificate("d2", OLDER)


def test_a_pending_identity_has_no_valid_certificate(registry: Registry) -> None:
    add(registry, "d1")
    set_identity(registry, "d1", state=IdentityState.PENDING, fingerprint="", not_after=0.0)
    assert not registry.identities.knows_certificate("d1", "")


@pytest.mark.parametrize(
    "state", [IdentityState.PENDING, IdentityState.SUSPENDED, IdentityState.REVOKED]
)
def test_a_valid_certificate_does_not_admit_an_identity_that_is_not_active(
    registry: Registry, state: IdentityState
) -> None:
    add(registry, "d1")
    assert registry.identities.admitted("d1", NEWEST) is not None
    set_identity(registry, "d1", state=state)
    assert registry.identities.admitted("d1", NEWEST) is None


def test_the_revocation_list_has_revoked_certificates_and_those_on_hold_that_have_not_ended(
    registry: Registry,
) -> None:
    for name in ("active", "held", "out"):
        add(registry, name)
        keep(registry, name, f"{len(name):x}", f"{name:0>64}")
    keep(registry, "out", "e0", "e" * 64, not_after=NOW - 1)
    registry.identities.suspend("held")
    registry.identities.revoke("out")
    listed = {
        row.serial: (row.name, row.revoked_at is None)
        for row in registry.identities.revoked_certificates()
    }
    assert listed == {"4": ("held", True), "3": ("out", False)}


def test_a_resumed_identity_leaves_the_revocation_list(registry: Registry) -> None:
    add(registry, "d1")
    keep(registry, "d1", "1", OLDER)
    registry.identities.suspend("d1")
    assert registry.identities.revoked_certificates() != []
    registry.identities.resume("d1")
    assert registry.identities.revoked_certificates() == []


def test_a_revoked_certificate_stays_on_the_list_when_its_name_is_enrolled_again(
    registry: Registry,
) -> None:
    add(registry, "d1")
    keep(registry, "d1", "1", OLDER)
    registry.identities.revoke("d1")
    set_identity(registry, "d1", state=IdentityState.ACTIVE, fingerprint=NEWEST)
    assert [row.serial for row in registry.identities.revoked_certificates()] == ["1"]


def test_denied_are_devices_that_are_suspended_revoked_or_expired(registry: Registry) -> None:
    for name in ("active", "expired", "held", "out", "waiting"):
        add(registry, name)
    add(registry, "app", Role.APP)
    registry.identities.revoke("app")
    registry.identities.suspend("held")
    registry.identities.revoke("out")
    set_identity(registry, "expired", not_after=NOW - 1)
    set_identity(registry, "waiting", state=IdentityState.PENDING, not_after=0.0)
    assert set(registry.identities.denied()) == {"expired", "held", "out"}


def test_of_too_many_denied_devices_those_with_the_longest_certificates_are_listed(
    registry: Registry,
) -> None:
    for i in range(4):
        add(registry, f"d{i}")
        set_identity(registry, f"d{i}", state=IdentityState.REVOKED, not_after=1000.0 + i)
    assert registry.identities.denied(limit=2) == ["d3", "d2"]


def test_all_grants_are_those_of_active_identities(registry: Registry) -> None:
    add(registry, "d1")
    add(registry, "d2")
    add(registry, "hub", Role.SERVER)
    set_identity(registry, "d2", state=IdentityState.SUSPENDED)
    assert registry.identities.all_grants() == [
        registry.identities.grants("d1"),
        registry.identities.grants("hub"),
    ]


def test_all_grants_resolve_names_groups_and_tags_both_ways(registry: Registry) -> None:
    add(registry, "d1", group="lab")
    add(registry, "d2", group="lab")
    add(registry, "d3")
    registry.identities._transactions.write(
        lambda db: db.add(TagRecord(device="d3", key="floor", value="1"))
    )
    add(registry, "by-group", Role.APP, targets=("lab", "d1"))
    add(registry, "by-tag", Role.APP)
    registry.identities._transactions.write(
        lambda db: db.add(AllowedTarget(app="by-tag", target="floor=1"))
    )
    assert {grants.name: grants.targets for grants in registry.identities.all_grants()} == {
        "by-group": ("d1", "d2"),
        "by-tag": ("d3",),
        "d1": ("by-group",),
        "d2": ("by-group",),
        "d3": ("by-tag",),
    }


def test_the_denylist_is_published_when_it_changes_and_when_the_link_is_back(
    registry: Registry,
) -> None:
    add(registry, "d1")
    broker = InMemoryBroker()
    inbox = Inbox()
    with broker.connect("hub") as server, broker.connect("w1") as worker:
        worker.subscribe(topics.REVOKED, inbox)
        denials = DenylistPublisher(server, registry)
        again = threading.Semaphore(0)
        server.on_up(again.release)  # as the server does: the watcher runs its tasks again
        assert again.acquire(timeout=WAIT_S)
        denials.publish()
        denials.publish()
        registry.identities.revoke("d1")
        denials.publish()
        server.drop()
        server.restore()
        assert again.acquire(timeout=WAIT_S)
        denials.publish()
        told = [decode_denylist(inbox.get()[1]) for _ in range(3)]
    assert told == [frozenset(), {"d1"}, {"d1"}]
    assert inbox.is_empty


@pytest.mark.parametrize("num_devices", [3, FEW + 4], ids=["few", "many"])
def test_one_look_up_for_many_holders_gives_each_what_its_own_would_give(
    registry: Registry, num_devices: int
) -> None:
    names = [f"d{i}" for i in range(num_devices)]
    for name in names:
        add(registry, name)
    add(registry, "a1", Role.APP, targets=tuple(names[1:]))
    keep(registry, "d1", "1", OLDER)
    registry.identities.suspend("d0")
    registry.identities.revoke("d2")
    holders = [(name, newest) for name in [*names, "a1", "d99"] for newest in (NEWEST, OLDER, "")]
    rights = registry.identities.admitted_holders(holders)
    assert rights == [registry.identities.admitted(*holder) for holder in holders]
    assert sum(grants is not None for grants in rights) == num_devices
