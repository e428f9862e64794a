"""Enrolment by token, renewal, and the states of an identity."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy.orm import Session

from fleet.errors import (
    CredentialsError,
    CsrError,
    ExpiredTokenError,
    FleetError,
    IdentityError,
    StateError,
    TokenNameError,
    UnknownDeviceError,
    UnknownTokenError,
    UsedTokenError,
)
from fleet.identity.enrolment import Enrolment
from fleet.protocol.access import Grants, Role
from fleet.registry.identities.certificates import revoke_certificates
from fleet.registry.identities.lifecycle import IdentityState
from fleet.registry.identities.repository import IdentityRepository
from fleet.registry.identities.tokens import Claim
from fleet.registry.models import IdentityRecord
from fleet.registry.results import Certified, IssuedCertificate, NewToken
from fleet.registry.store import Registry
from tests.fleet.conftest import add

NUMBERS = itertools.count(1)
DAY_S = 86_400.0


def key(number: int) -> str:
    return f"{number:064x}"


def issue(key_hash: str, life_s: float = DAY_S) -> IssuedCertificate:
    """Return a certificate as an authority issues it; the registry does not parse it."""
    serial = f"{next(NUMBERS):x}"
    fingerprint = hashlib.sha256(serial.encode()).hexdigest()
    now = time.time()
    return IssuedCertificate(
        serial=serial,
        fingerprint=fingerprint,
        key_hash=key_hash,
        pem=f"certificate {serial}",
        not_before=now,
        not_after=now + life_s,
    )


def invite(
    registry: Registry, name: str = "edge-1", ttl_s: float = 900, *, replace: bool = False
) -> NewToken:
    (token,) = registry.identities.enroll([Enrolment(name=name)], ttl_s, replace=replace)
    return token


def join(registry: Registry, token: NewToken, number: int = 1, **changes: Any) -> Certified:
    claim = dataclasses.replace(Claim(token.id, token.secret, key(number)), **changes)
    return registry.identities.join(claim, lambda name, role: issue(key(number)), actor="192.0.2.7")


def state_of(registry: Registry, name: str = "edge-1") -> str:
    return next(row.state for row in registry.identities.all() if row.name == name)


def fingerprint_of(registry: Registry, name: str = "edge-1") -> str:
    return next(row.fingerprint for row in registry.identities.all() if row.name == name)


def actions(registry: Registry) -> list[tuple[str, str, str]]:
    """Return the audit log, oldest first: actor, action and subject."""
    return [(row.actor, row.action, row.subject) for row in reversed(registry.audit_log.entries())]


# Tokens.


def test_an_identity_waits_until_it_joins(registry: Registry) -> None:
    token = invite(registry)
    assert (state_of(registry), registry.identities.grants("edge-1")) == (
        IdentityState.PENDING,
        None,
    )
    joined = join(registry, token)
    assert (joined.name, joined.role, state_of(registry)) == (
        "edge-1",
        "device",
        IdentityState.ACTIVE,
    )
    assert registry.identities.grants("edge-1") == Grants(Role.DEVICE, "edge-1")


def test_the_same_key_gets_the_same_certificate_again_and_even_when_the_time_is_over(
    registry: Registry,
) -> None:
    token = invite(registry)
    first = join(registry, token)
    assert join(registry, token) == first
    claim = Claim(token.id, token.secret, key(1))
    assert (
        registry.identities.join(claim, _none_is_made, actor="x", now=token.expires_at + 1) == first
    )


def _none_is_made(name: str, role: Role) -> IssuedCertificate:
    raise AssertionError("a second certificate")


def test_a_second_key_is_refused(registry: Registry) -> None:
    token = invite(registry)
    join(registry, token)
    with pytest.raises(UsedTokenError, match="another key has used this token of 'edge-1'"):
        join(registry, token, 2)


def test_of_twenty_keys_at_the_same_time_one_wins(registry: Registry) -> None:
    token = invite(registry)
    start = threading.Barrier(20)

    def attempt(number: int) -> Certified | FleetError:
        start.wait(30)
        try:
            return join(registry, token, number)
        except UsedTokenError as error:
            return error

    with ThreadPoolExecutor(20) as pool:
        results = list(pool.map(attempt, range(20)))
    (winner,) = (result for result in results if isinstance(result, Certified))
    assert join(registry, token, results.index(winner)) == winner
    assert [action for _, action, _ in actions(registry)].count("join") == 1


def test_one_key_twenty_times_at_once_gets_one_certificate(registry: Registry) -> None:
    token = invite(registry)
    with ThreadPoolExecutor(20) as pool:
        assert (
            len({joined.pem for joined in pool.map(lambda _: join(registry, token), range(20))})
            == 1
        )


def test_a_token_expires(registry: Registry) -> None:
    token = invite(registry, ttl_s=60)
    claim = Claim(token.id, token.secret, key(1))
    with pytest.raises(ExpiredTokenError, match="the time of this token of 'edge-1' is over"):
        registry.identities.join(claim, _none_is_made, actor="x", now=token.expires_at)
    assert join(registry, token)


def test_a_wrong_secret_is_an_unknown_token(registry: Registry) -> None:
    token = invite(registry)
    wrong: list[dict[str, Any]] = [{"secret": "0" * 64}, {"id": "0" * 16}]
    for changes in wrong:
        with pytest.raises(UnknownTokenError, match="unknown token"):
            join(registry, token, **changes)


def test_a_newer_token_replaces_an_older_one(registry: Registry) -> None:
    old = invite(registry)
    new = invite(registry)
    with pytest.raises(UnknownTokenError):
        join(registry, old)
    assert join(registry, new)


def test_a_request_for_another_name_does_not_use_the_token_up(registry: Registry) -> None:
    token = invite(registry)
    with pytest.raises(TokenNameError, match="is for 'edge-2': expected the token's 'edge-1'"):
        join(registry, token, name="edge-2")
    assert join(registry, token, name="edge-1")


def test_a_certificate_that_cannot_be_made_does_not_use_the_token_up(registry: Registry) -> None:
    token = invite(registry)

    def fail(name: str, role: Role) -> IssuedCertificate:
        raise IdentityError("no authority")

    with pytest.raises(IdentityError, match="no authority"):
        registry.identities.join(Claim(token.id, token.secret, key(1)), fail, actor="x")
    assert join(registry, token, 2)


def test_the_secret_is_nowhere_in_the_registry(registry: Registry) -> None:
    token = invite(registry)
    join(registry, token)
    with pytest.raises(UsedTokenError):
        join(registry, token, 2)
    assert token.secret not in repr([registry.audit_log.entries(), registry.identities.all()])
    assert token.secret not in repr(Claim(token.id, token.secret, key(1)))
    assert token.secret not in repr(token)


def test_every_attempt_is_in_the_audit_log(registry: Registry) -> None:
    token = invite(registry)
    actor = registry.actor
    join(registry, token)
    with pytest.raises(UsedTokenError):
        join(registry, token, 2)
    with pytest.raises(UnknownTokenError):
        join(registry, token, id="0" * 16)
    assert actions(registry) == [
        (actor, "enroll", "edge-1"),
        ("192.0.2.7", "join", "edge-1"),
        ("192.0.2.7", "join_refused", "edge-1"),
        ("192.0.2.7", "join_refused", "0" * 16),
    ]
    assert registry.audit_log.entries("edge-1")[0].details == {
        "token": token.id,
        "code": "used_token",
    }


# Enrolment.


def test_an_active_name_is_enrolled_again_on_purpose_only(registry: Registry) -> None:
    token = invite(registry)
    join(registry, token)
    old = fingerprint_of(registry)
    with pytest.raises(IdentityError, match=r"'edge-1' is enrolled already, as device; .*--force"):
        invite(registry)
    again = invite(registry, replace=True)
    assert state_of(registry) == IdentityState.PENDING
    with pytest.raises(UnknownTokenError):
        join(registry, token)
    join(registry, again, 2)
    with pytest.raises(StateError, match="this certificate of 'edge-1' was revoked"):
        registry.identities.role_of(old)
    assert registry.identities.role_of(fingerprint_of(registry)) == ("edge-1", Role.DEVICE)


def test_a_revoked_or_expired_identity_can_be_enrolled_again(
    registry: Registry,
) -> None:
    join(registry, invite(registry))
    registry.identities.revoke("edge-1")
    join(registry, invite(registry), 2)
    registry.identities.add_identity("edge-2", Role.DEVICE, fingerprint="0" * 64, not_after=1.0)
    assert state_of(registry, "edge-2") == IdentityState.EXPIRED
    join(registry, invite(registry, "edge-2"), 3)
    assert {state_of(registry), state_of(registry, "edge-2")} == {IdentityState.ACTIVE}


def test_all_are_enrolled_or_none(registry: Registry) -> None:
    add(registry, "edge-2")
    with pytest.raises(IdentityError, match="'edge-2' is enrolled already"):
        registry.identities.enroll([Enrolment(name="edge-1"), Enrolment(name="edge-2")], 900)
    assert [row.name for row in registry.identities.all()] == ["edge-2"]


def test_an_app_may_come_before_the_devices_that_it_is_allowed(registry: Registry) -> None:
    phone = Enrolment(name="phone", role=Role.APP, targets=("hall", "edge-1"))
    wanted = [phone, Enrolment(name="edge-1"), Enrolment(name="e2", group="hall")]
    assert [token.name for token in registry.identities.enroll(wanted, 900)] == [
        "phone",
        "edge-1",
        "e2",
    ]
    assert [row.targets for row in registry.identities.all(Role.APP)] == [("edge-1", "hall")]


def test_a_group_is_never_a_name_within_one_enrolment_either(registry: Registry) -> None:
    with pytest.raises(IdentityError, match="'hall' is the name of a group"):
        registry.identities.enroll(
            [Enrolment(name="edge-1", group="hall"), Enrolment(name="hall")], 900
        )


def test_tags_are_shown_and_replaced(registry: Registry) -> None:
    registry.identities.enroll(
        [Enrolment(name="edge-1", tags={"site": "roof", "arch": "arm64"})], 900
    )
    assert registry.stats.devices()[0].tags == {"arch": "arm64", "site": "roof"}
    registry.identities.enroll([Enrolment(name="edge-1", tags={"site": "attic"})], 900)
    (row,) = registry.identities.all()
    assert (row.tags, row.state) == ({"site": "attic"}, "pending")
    assert registry.stats.devices()[0].state == "pending"


def test_a_certificate_made_without_the_service_is_known_as_well(registry: Registry) -> None:
    issued = issue(key(1))
    registry.identities.add_certified([(Enrolment(name="edge-1", group="hall"), issued)])
    assert (state_of(registry), registry.identities.role_of(issued.fingerprint)) == (
        IdentityState.ACTIVE,
        ("edge-1", Role.DEVICE),
    )
    registry.identities.revoke("edge-1")
    with pytest.raises(StateError, match="'edge-1' is revoked"):
        registry.identities.role_of(issued.fingerprint)


def test_an_identity_from_before_certificates_were_kept_is_known_by_its_own(
    registry: Registry,
) -> None:
    add(registry, "edge-1")
    assert registry.identities.role_of("0" * 64) == ("edge-1", Role.DEVICE)
    with pytest.raises(CredentialsError, match="does not know this certificate"):
        registry.identities.role_of("1" * 64)


def test_an_empty_fingerprint_matches_no_identity(registry: Registry) -> None:
    invite(registry)
    with pytest.raises((CredentialsError, StateError)):
        registry.identities.role_of("")


# Renewal.


def renew(registry: Registry, fingerprint: str, number: int, **options: object) -> Certified:

    def make(name: str, role: Role) -> IssuedCertificate:
        return issue(key(number))

    return registry.identities.renew(fingerprint, key(number), make, **options)  # type: ignore[arg-type]


def test_a_renewed_identity_has_another_certificate_and_the_old_one_still_counts(
    registry: Registry,
) -> None:
    join(registry, invite(registry))
    old = fingerprint_of(registry)
    renewed = renew(registry, old, 2)
    assert (renewed.name, fingerprint_of(registry) != old) == ("edge-1", True)
    assert registry.identities.role_of(old) == registry.identities.role_of(fingerprint_of(registry))
    assert actions(registry)[-1] == ("edge-1", "renew", "edge-1")


def test_a_renewal_whose_reply_was_lost_gives_the_same_certificate(registry: Registry) -> None:
    join(registry, invite(registry))
    old = fingerprint_of(registry)
    assert renew(registry, old, 2) == renew(registry, old, 2)


def test_a_renewal_needs_a_new_key_and_its_own_name(registry: Registry) -> None:
    join(registry, invite(registry))
    with pytest.raises(CsrError, match="expected a new key"):
        renew(registry, fingerprint_of(registry), 1)
    with pytest.raises(
        TokenNameError, match="is for 'edge-2': expected the certificate's 'edge-1'"
    ):
        renew(registry, fingerprint_of(registry), 2, csr_name="edge-2")


def test_a_renewal_that_waited_for_a_new_enrolment_is_refused(registry: Registry) -> None:
    """The holder of a stolen key must get no certificate after the one that replaces it."""
    join(registry, invite(registry))
    stolen = fingerprint_of(registry)
    futures = list[Future[Certified]]()

    def replace(db: Session) -> None:
        db.get(IdentityRecord, "edge-1", with_for_update=True)
        futures.append(pool.submit(renew, registry, stolen, 2))
        assert wait(futures, timeout=0.3).not_done, "it has to wait for us"
        revoke_certificates(db, "edge-1", time.time())

    with ThreadPoolExecutor(1) as pool:
        registry.identities._transactions.write(replace)
        with pytest.raises(StateError, match="was revoked"):
            futures[0].result(30)


@pytest.mark.parametrize("change", [IdentityRepository.suspend, IdentityRepository.revoke])
def test_an_identity_that_is_not_active_cannot_renew(registry: Registry, change: object) -> None:
    join(registry, invite(registry))
    change(registry.identities, "edge-1")  # type: ignore[operator]
    with pytest.raises(StateError):
        renew(registry, fingerprint_of(registry), 2)


# States.


def test_a_suspended_identity_has_no_rights_until_it_is_resumed(registry: Registry) -> None:
    token = invite(registry)
    join(registry, token)
    registry.identities.suspend("edge-1")
    assert (state_of(registry), registry.identities.grants("edge-1")) == (
        IdentityState.SUSPENDED,
        None,
    )
    with pytest.raises(StateError, match="cannot join 'edge-1', which is suspended"):
        join(registry, token)
    registry.identities.resume("edge-1")
    assert (state_of(registry), registry.identities.grants("edge-1") is not None) == (
        IdentityState.ACTIVE,
        True,
    )


def test_a_revoked_identity_cannot_join_with_the_token_that_it_had(registry: Registry) -> None:
    token = invite(registry)
    registry.identities.revoke("edge-1")
    with pytest.raises(StateError, match="cannot join 'edge-1', which is revoked"):
        join(registry, token)
    assert registry.audit_log.entries("edge-1")[0].details["code"] == "bad_state"


def test_revoking_records_the_serials_that_it_revokes(registry: Registry) -> None:
    join(registry, invite(registry))
    renew(registry, fingerprint_of(registry), 2)
    registry.identities.revoke("edge-1")
    assert len(registry.audit_log.entries("edge-1")[0].details["serials"]) == 2
    registry.identities.revoke("edge-1")
    assert registry.audit_log.entries("edge-1")[0].details["serials"] == []


@pytest.mark.parametrize(
    "change", [IdentityRepository.suspend, IdentityRepository.resume, IdentityRepository.revoke]
)
def test_an_unknown_name_cannot_change_its_state(registry: Registry, change: object) -> None:
    with pytest.raises(UnknownDeviceError, match="unknown identity 'oven'"):
        change(registry.identities, "oven")  # type: ignore[operator]


def test_an_illegal_change_changes_nothing(registry: Registry) -> None:
    invite(registry)
    for change in (registry.identities.suspend, registry.identities.resume):
        with pytest.raises(StateError, match="which is pending"):
            change("edge-1")
    assert actions(registry) == [(registry.actor, "enroll", "edge-1")]


def test_a_revocation_among_concurrent_joins_and_suspensions_is_kept(registry: Registry) -> None:
    token = invite(registry)
    join(registry, token)

    def disturb(i: int) -> None:
        change = (
            registry.identities.suspend,
            registry.identities.resume,
            lambda _: join(registry, token),
        )[i % 3]
        with suppress(StateError):
            change("edge-1")

    with ThreadPoolExecutor(8) as pool:
        work = [pool.submit(disturb, i) for i in range(24)]
        work.insert(12, pool.submit(registry.identities.revoke, "edge-1"))
        for done in work:
            done.result(60)
    assert state_of(registry) == IdentityState.REVOKED
