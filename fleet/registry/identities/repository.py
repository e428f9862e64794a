"""Who belongs to the fleet: the part of the registry that knows names, certificates and rights."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet.errors import StateError, TokenError
from fleet.identity.enrolment import Enrolment
from fleet.protocol.access import Grants, Role
from fleet.protocol.denylist import MAX_DENIED
from fleet.registry.audit import audit
from fleet.registry.identities.certificates import MakeCertificate, holder, keep_certificate
from fleet.registry.identities.enrolment import enroll
from fleet.registry.identities.everybody import all_grants
from fleet.registry.identities.grants import all_tags, allow, change_tags, disallow, targets_of
from fleet.registry.identities.lifecycle import change_state, renew
from fleet.registry.identities.revocation import denied, knows_certificate, revoked_certificates
from fleet.registry.identities.states import IdentityChange, IdentityState, next_state, state_at
from fleet.registry.identities.tokens import Claim, add_token, join, name_of_token
from fleet.registry.models import (
    AllowedTarget,
    IdentityRecord,
)
from fleet.registry.results import (
    Certified,
    IdentityRow,
    IssuedCertificate,
    NewToken,
    RevokedCertificate,
)
from fleet.registry.transactions import Part


class IdentityRepository(Part):
    """Enrolment, certificates, states and rights of identities."""

    def add_identity(
        self,
        name: str,
        role: Role,
        group: str | None = None,
        targets: Iterable[str] = (),
        *,
        fingerprint: str,
        not_after: float,
        replace: bool = False,
    ) -> None:
        """Enrols `name` with a certificate that the registry does not keep. `targets` are as in `Enrolment`.

        Raises:
            IdentityError: the name is taken (unless `replace`), is a group's, or the group's is a device's;
                a target is neither a device nor a group nor a tag.
        """
        wanted = Enrolment(name=name, role=role, group=group, targets=tuple(targets))

        def work(db: Session) -> None:
            record = enroll(db, wanted, replace=replace)
            record.state = next_state(name, IdentityState.PENDING, IdentityChange.JOIN)
            record.fingerprint = fingerprint
            record.not_after = not_after
            self._audit_enrolment(db, wanted)

        self._transactions.write(work)

    def add_certified(
        self, enrolled: Iterable[tuple[Enrolment, IssuedCertificate]], *, replace: bool = False
    ) -> None:
        """Enrols each with a certificate that was made for it: all of them, or none.

        Raises:
            IdentityError: as `add_identity`.
        """
        pairs = sorted(
            enrolled, key=lambda pair: pair[0].role is Role.APP
        )  # after the devices that they are allowed

        def work(db: Session) -> None:
            for wanted, issued in pairs:
                record = enroll(db, wanted, replace=replace)
                record.state = next_state(wanted.name, IdentityState.PENDING, IdentityChange.JOIN)
                keep_certificate(db, record, issued)
                self._audit_enrolment(db, wanted, serial=issued.serial)

        self._transactions.write(work)

    def enroll(
        self, enrolments: Iterable[Enrolment], ttl_s: float, *, replace: bool = False
    ) -> list[NewToken]:
        """Makes or changes identities that wait to join, all of them or none: a token each, good for `ttl_s` seconds.

        Raises:
            IdentityError: as `add_identity`.
        """
        wanted = list(enrolments)

        def work(db: Session) -> list[NewToken]:
            tokens = {}
            for each in sorted(wanted, key=lambda each: each.role is Role.APP):
                enroll(db, each, replace=replace)
                tokens[each.name] = token = add_token(db, each.name, ttl_s, time.time())
                self._audit_enrolment(db, each, token=token.id, expires_at=token.expires_at)
            return [tokens[each.name] for each in wanted]

        return self._transactions.write(work)

    def _audit_enrolment(self, db: Session, enrolment: Enrolment, **details: str | float) -> None:
        described = {
            "role": enrolment.role.value,
            "group": enrolment.group,
            "allow": list(enrolment.targets),
        }
        audit(
            db,
            self.actor,
            IdentityChange.ENROLL,
            enrolment.name,
            **described,
            tags=enrolment.tags,
            **details,
        )

    def join(
        self, claim: Claim, make: MakeCertificate, *, actor: str, now: float | None = None
    ) -> Certified:
        """Uses a token up: the first key that brings it gets a certificate, and the very same when it asks again.

        `actor` is who asks, for the audit log.

        Raises:
            UnknownTokenError: no such token, or another secret.
            UsedTokenError: another key was first.
            ExpiredTokenError: nobody used it in time.
            TokenNameError: the claim has a name, and the token is for another.
            StateError: the identity was suspended, revoked or has expired.
        """
        at = now or time.time()
        try:
            return self._transactions.write(lambda db: join(db, actor, claim, make, at))
        except (TokenError, StateError) as error:
            code = error.code
            self._transactions.write(
                lambda db: audit(
                    db,
                    actor,
                    "join_refused",
                    name_of_token(db, claim.id) or claim.id,
                    token=claim.id,
                    code=code,
                )
            )
            raise

    def renew(
        self,
        fingerprint: str,
        key_hash: str,
        make: MakeCertificate,
        *,
        csr_name: str | None = None,
        now: float | None = None,
    ) -> Certified:
        """A certificate for another key of whoever holds the one with `fingerprint`, and the same when asked again.

        Raises:
            CredentialsError: nobody holds it.
            StateError: it was revoked, or its identity is not active.
            TokenNameError: `csr_name` is given and is another's.
            CsrError: the key is the same.
        """
        at = now or time.time()
        return self._transactions.write(
            lambda db: renew(db, fingerprint, key_hash, csr_name, make, at)
        )

    def role_of(self, fingerprint: str, now: float | None = None) -> tuple[str, Role]:
        """The name and role of whoever holds a certificate.

        Raises:
            CredentialsError: nobody holds it.
            StateError: it was revoked, or its identity is not active.
        """
        with self._transactions.reading() as db:
            record = holder(db, fingerprint, now or time.time())
            return record.name, Role(record.role)

    def suspend(self, name: str) -> None:
        """Takes an identity's rights away until it is resumed.

        Raises:
            UnknownDeviceError: nobody enrolled `name`.
            StateError: it is not active.
        """
        self._change_state(name, IdentityChange.SUSPEND)

    def resume(self, name: str) -> None:
        """Raises UnknownDeviceError, or StateError when it is not suspended."""
        self._change_state(name, IdentityChange.RESUME)

    def revoke(self, name: str) -> None:
        """Takes an identity's rights away for good, and revokes its certificates.

        Raises:
            UnknownDeviceError: nobody enrolled `name`.
        """
        self._change_state(name, IdentityChange.REVOKE)

    def _change_state(self, name: str, change: IdentityChange) -> None:
        self._transactions.write(lambda db: change_state(db, self.actor, name, change, time.time()))

    def identities(self, role: Role | None = None) -> list[IdentityRow]:
        """Everyone that was enrolled, by name; only those of `role` when it is given."""
        query = select(IdentityRecord).order_by(IdentityRecord.name)
        now = time.time()
        with self._transactions.reading() as db:
            records = db.scalars(query.where(IdentityRecord.role == role) if role else query).all()
            allowed = db.execute(
                select(AllowedTarget.app, AllowedTarget.target).order_by(AllowedTarget.target)
            ).all()
            tags = all_tags(db)
        return [
            IdentityRow(
                name=record.name,
                role=record.role,
                group=record.group,
                targets=tuple(target for app, target in allowed if app == record.name),
                fingerprint=record.fingerprint,
                created_at=record.created_at,
                not_after=record.not_after,
                state=state_at(record.state, record.not_after, now),
                tags=tags.get(record.name, {}),
            )
            for record in records
        ]

    def grants(self, name: str) -> Grants | None:
        """What `name` may do, with today's groups and tags; None for who is unknown, suspended, revoked or expired."""
        with self._transactions.reading() as db:
            record = db.get(IdentityRecord, name)
            if (
                record is None
                or state_at(record.state, record.not_after, time.time()) is not IdentityState.ACTIVE
            ):
                return None
            return Grants(Role(record.role), name, targets_of(db, record))

    def allow(self, app: str, targets: Iterable[str]) -> None:
        """Lets an app prompt more devices, and them hear its events: devices, groups, or tags ``key=value``.

        Raises:
            IdentityError: `app` is no app, or a target is neither a device nor a group nor a tag.
        """
        wanted = tuple(targets)
        self._transactions.write(lambda db: allow(db, self.actor, app, wanted))

    def disallow(self, app: str, targets: Iterable[str]) -> None:
        """Takes back what was allowed, by the same words.

        Raises:
            IdentityError: `app` is no app, or was not allowed one of them.
        """
        taken = tuple(targets)
        self._transactions.write(lambda db: disallow(db, self.actor, app, taken))

    def tag(self, device: str, tags: Mapping[str, str], remove: Iterable[str] = ()) -> None:
        """Sets tags of a device, and takes those away whose keys are in `remove`.

        Raises:
            UnknownDeviceError: nobody enrolled it.
        """
        gone = tuple(remove)
        self._transactions.write(lambda db: change_tags(db, self.actor, device, tags, gone))

    def all_grants(self) -> list[Grants]:
        """What everybody who is active may do, by name."""
        with self._transactions.reading() as db:
            return all_grants(db, time.time())

    def knows_certificate(self, name: str, fingerprint: str) -> bool:
        """Whether the certificate of `name` with this SHA-256 (of its DER, in hex) counts: handed out, not revoked."""
        with self._transactions.reading() as db:
            return knows_certificate(db, name, fingerprint)

    def admitted(self, name: str, fingerprint: str) -> Grants | None:
        """What the holder of a certificate may do; None when it does not count, or `name` is not active."""
        return self.grants(name) if self.knows_certificate(name, fingerprint) else None

    def revoked_certificates(self, now: float | None = None) -> list[RevokedCertificate]:
        """What belongs on a revocation list: revoked or on hold, and not ended yet, by serial."""
        with self._transactions.reading() as db:
            return revoked_certificates(db, time.time() if now is None else now)

    def denied(self, now: float | None = None, limit: int = MAX_DENIED) -> list[str]:
        """The devices that are suspended, revoked or expired; at most `limit`, the latest certificates first."""
        with self._transactions.reading() as db:
            return denied(db, time.time() if now is None else now, limit)
