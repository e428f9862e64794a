"""The repository of identities: names, certificates and grants."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet.errors import StateError, TokenError, UnknownDeviceError
from fleet.identity.enrolment import Enrolment
from fleet.protocol.access import Grants, Role
from fleet.protocol.denylist import MAX_DENIED
from fleet.registry.audit import audit
from fleet.registry.identities.api_keys import revoke_keys
from fleet.registry.identities.certificates import (
    MakeCertificate,
    holder,
    is_denied,
    keep_certificate,
    knows_certificate,
    renew,
    revoke_certificates,
    revoked_certificates,
    state_after,
    valid_fingerprints,
)
from fleet.registry.identities.devices import check_device, has_device_role
from fleet.registry.identities.enrolment import check_group, delete_details, enroll
from fleet.registry.identities.grants import (
    all_grants,
    allow,
    change_tags,
    disallow,
    grants_of,
    grants_of_names,
    tags_by_device,
    targets_by_app,
)
from fleet.registry.identities.lifecycle import (
    IdentityChange,
    IdentityState,
    next_state,
    state_at,
)
from fleet.registry.identities.tokens import (
    Claim,
    add_token,
    delete_tokens,
    join,
    name_of_token,
    open_tokens,
)
from fleet.registry.models import CertificateRecord, IdentityRecord
from fleet.registry.results import (
    Certified,
    IdentityRow,
    IssuedCertificate,
    NewToken,
    RevokedCertificate,
    TokenRow,
)
from fleet.registry.transactions import Repository


class IdentityRepository(Repository):
    """Enrolment, certificates, states and grants of identities. Each method is one transaction."""

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
        """Enrol `name` with a certificate that the registry does not store.

        `targets` are as in `Enrolment`.

        Raises:
            IdentityError: the name is taken (unless `replace`), is a group's, or the group's is a
                device's; a target is neither a device nor a group nor a tag.
        """
        enrolment = Enrolment(name=name, role=role, group=group, targets=tuple(targets))

        def work(db: Session) -> None:
            record = enroll(db, enrolment, replace=replace)
            record.state = next_state(name, IdentityState.PENDING, IdentityChange.JOIN)
            record.fingerprint = fingerprint
            record.not_after = not_after
            self._audit_enrolment(db, enrolment)

        self._transactions.write(work)

    def add_certified(
        self, enrolled: Iterable[tuple[Enrolment, IssuedCertificate]], *, replace: bool = False
    ) -> None:
        """Enrol each with a certificate that was issued for it: all of them, or none.

        Raises:
            IdentityError: as `add_identity`.
        """
        pairs = list(enrolled)
        pairs.sort(key=lambda pair: pair[0].role is Role.APP)  # after the devices it may prompt

        def work(db: Session) -> None:
            for enrolment, issued in pairs:
                name = enrolment.name
                record = enroll(db, enrolment, replace=replace)
                record.state = next_state(name, IdentityState.PENDING, IdentityChange.JOIN)
                keep_certificate(db, record, issued)
                self._audit_enrolment(db, enrolment, serial=issued.serial)

        self._transactions.write(work)

    def enroll(
        self, enrolments: Iterable[Enrolment], ttl_s: float, *, replace: bool = False
    ) -> list[NewToken]:
        """Add or change identities that are pending until they join, all of them or none.

        Return a token for each, valid for `ttl_s` seconds.

        Raises:
            IdentityError: as `add_identity`.
        """
        ordered = list(enrolments)

        def work(db: Session) -> list[NewToken]:
            tokens = {}
            for each in sorted(ordered, key=lambda each: each.role is Role.APP):
                enroll(db, each, replace=replace)
                token = add_token(db, each.name, ttl_s, time.time())
                tokens[each.name] = token
                self._audit_enrolment(db, each, token=token.id, expires_at=token.expires_at)
            return [tokens[each.name] for each in ordered]

        return self._transactions.write(work)

    def _audit_enrolment(self, db: Session, enrolment: Enrolment, **details: str | float) -> None:
        audit(
            db,
            self.actor,
            IdentityChange.ENROLL,
            enrolment.name,
            role=enrolment.role.value,
            group=enrolment.group,
            allow=list(enrolment.targets),
            tags=enrolment.tags,
            **details,
        )

    def join(
        self, claim: Claim, make: MakeCertificate, *, actor: str, now: float | None = None
    ) -> Certified:
        """Use a token up: the first key that presents it gets a certificate.

        The same key gets the same certificate when it asks again. `actor` is the requester, for
        the audit log, which also records a refusal.

        Raises:
            UnknownTokenError: there is no such token, or its secret is another.
            UsedTokenError: another key has used it.
            ExpiredTokenError: it was not used in time.
            TokenNameError: the claim has a name, and the token is for another.
            StateError: the identity is suspended, revoked or expired.
        """
        at = now or time.time()
        try:
            return self._transactions.write(lambda db: join(db, actor, claim, make, at))
        except (TokenError, StateError) as error:
            self._audit_refusal(claim, actor, error.code)
            raise

    def _audit_refusal(self, claim: Claim, actor: str, code: str) -> None:
        def work(db: Session) -> None:
            subject = name_of_token(db, claim.id) or claim.id
            audit(db, actor, "join_refused", subject, token=claim.id, code=code)

        self._transactions.write(work)

    def renew(
        self,
        fingerprint: str,
        key_hash: str,
        make: MakeCertificate,
        *,
        csr_name: str | None = None,
        now: float | None = None,
    ) -> Certified:
        """Issue a certificate for a new key to the holder of the one with `fingerprint`.

        Return the same certificate when asked again.

        Raises:
            CredentialsError: the registry does not know the certificate.
            StateError: it was revoked, or its identity is not active.
            TokenNameError: `csr_name` is given and is another's.
            CsrError: the key is the same.
        """
        at = now or time.time()
        return self._transactions.write(
            lambda db: renew(db, fingerprint, key_hash, make, csr_name=csr_name, now=at)
        )

    def invite(self, name: str, ttl_s: float) -> NewToken:
        """Return another token for an identity, which keeps its group, tags and targets.

        Its earlier tokens become invalid; a certificate that has not expired stays valid.

        Raises:
            UnknownDeviceError, StateError: it is not enrolled, or suspended or revoked.
        """
        now = time.time()

        def work(db: Session) -> NewToken:
            record = self._locked(db, name)
            record.state = state_after(record, IdentityChange.INVITE, now)
            delete_tokens(db, name)
            token = add_token(db, name, ttl_s, now)
            expires_at = token.expires_at
            audit(db, self.actor, IdentityChange.INVITE, name, token=token.id, expires=expires_at)
            return token

        return self._transactions.write(work)

    def recertify(self, name: str, role: Role, issued: IssuedCertificate) -> None:
        """Store another certificate of an identity, even if the last one has expired.

        `role` becomes its role. Certificates that have not expired stay valid.

        Raises:
            UnknownDeviceError, StateError: it is not enrolled, or suspended or revoked.
        """
        now = time.time()

        def work(db: Session) -> None:
            record = self._locked(db, name)
            record.state = state_after(record, IdentityChange.RECERTIFY, now)
            record.role = role.value
            delete_tokens(db, name)
            keep_certificate(db, record, issued)
            audit(db, self.actor, IdentityChange.RECERTIFY, name, serial=issued.serial)

        self._transactions.write(work)

    def newest_certificates(self, now: float | None = None) -> list[tuple[str, str]]:
        """Return the active identities, by name, with the newest certificate of each in PEM."""
        is_newest = IdentityRecord.fingerprint == CertificateRecord.fingerprint
        query = (
            select(IdentityRecord.name, CertificateRecord.pem)
            .join(CertificateRecord, is_newest)
            .where(IdentityRecord.state == IdentityState.ACTIVE)
            .where(IdentityRecord.not_after > (time.time() if now is None else now))
            .order_by(IdentityRecord.name)
        )
        with self._transactions.reading() as db:
            return [(name, pem) for name, pem in db.execute(query)]

    def role_of(self, fingerprint: str, now: float | None = None) -> tuple[str, Role]:
        """Return the name and the role of the holder of a certificate.

        Raises:
            CredentialsError: the registry does not know the certificate.
            StateError: it was revoked, or its identity is not active.
        """
        with self._transactions.reading() as db:
            record = holder(db, fingerprint, now or time.time())
            return record.name, Role(record.role)

    def suspend(self, name: str) -> None:
        """Withdraw an identity's grants until it is resumed.

        Raises:
            UnknownDeviceError, StateError: it is not enrolled, or not active.
        """
        self._change_state(name, IdentityChange.SUSPEND)

    def resume(self, name: str) -> None:
        """Restore the grants of a suspended identity.

        Raises:
            UnknownDeviceError, StateError: it is not enrolled, or not suspended.
        """
        self._change_state(name, IdentityChange.RESUME)

    def revoke(self, name: str) -> None:
        """Withdraw an identity's grants for good, and revoke its certificates and keys.

        Raises:
            UnknownDeviceError: it is not enrolled.
        """
        self._change_state(name, IdentityChange.REVOKE)

    def delete(self, name: str) -> None:
        """Delete an identity that is revoked or has never joined.

        Its name can be enrolled again, without its earlier group, tags, settings and rights. Its
        statistics stay.

        Raises:
            UnknownDeviceError: it is not enrolled.
            StateError: it is active, suspended or expired.
        """

        def work(db: Session) -> None:
            record = self._locked(db, name)
            state = state_at(record.state, record.not_after, time.time())
            record.state = next_state(name, state, IdentityChange.DELETE)
            delete_details(db, record)
            audit(db, self.actor, IdentityChange.DELETE, name, role=record.role)

        self._transactions.write(work)

    def move(self, device: str, group: str | None) -> None:
        """Change the group of a device; None is no group.

        Raises:
            UnknownDeviceError: it is not enrolled.
            IdentityError: the group's name is an identity's.
        """

        def work(db: Session) -> None:
            check_device(db, device)
            check_group(db, device, group)
            record = self._locked(db, device)
            earlier = record.group
            record.group = group
            audit(db, self.actor, "group", device, group=group, earlier=earlier)

        self._transactions.write(work)

    def _change_state(self, name: str, change: IdentityChange) -> None:
        now = time.time()

        def work(db: Session) -> None:
            record = self._locked(db, name)
            state = state_after(record, change, now)
            details = {}
            if change is IdentityChange.REVOKE:
                details["serials"] = revoke_certificates(db, name, now)
                revoke_keys(db, name, now)
            record.state = state
            audit(db, self.actor, change, name, **details)

        self._transactions.write(work)

    def _locked(self, db: Session, name: str) -> IdentityRecord:
        """Return an identity for a change. Raises UnknownDeviceError."""
        record = db.get(IdentityRecord, name, with_for_update=True)
        if record is None or record.state == IdentityState.DELETED:
            raise _unknown_identity(name)
        return record

    def all(self, role: Role | None = None) -> list[IdentityRow]:
        """Return every identity, by name; only those of `role` when it is given."""
        query = (
            select(IdentityRecord)
            .where(IdentityRecord.state != IdentityState.DELETED)
            .order_by(IdentityRecord.name)
        )
        if role:
            query = query.where(IdentityRecord.role == role)
        with self._transactions.reading() as db:
            targets = targets_by_app(db)
            tags = tags_by_device(db)
            return [
                _identity_row(record, targets.get(record.name, ()), tags.get(record.name, {}))
                for record in db.scalars(query)
            ]

    def get(self, name: str) -> IdentityRow:
        """Return one identity.

        Raises:
            UnknownDeviceError: it is not enrolled.
        """
        with self._transactions.reading() as db:
            record = db.get(IdentityRecord, name)
            if record is None or record.state == IdentityState.DELETED:
                raise _unknown_identity(name)
            targets = targets_by_app(db)
            tags = tags_by_device(db, [name])
            return _identity_row(record, targets.get(name, ()), tags.get(name, {}))

    def open_tokens(self) -> list[TokenRow]:
        """Return the enrolment tokens that can be used now, by their end."""
        with self._transactions.reading() as db:
            return open_tokens(db, time.time())

    def deleted(self) -> dict[str, Role]:
        """Return the names that are deleted and not enrolled again, each with its last role."""
        query = select(IdentityRecord.name, IdentityRecord.role).where(
            IdentityRecord.state == IdentityState.DELETED
        )
        with self._transactions.reading() as db:
            return {name: Role(role) for name, role in db.execute(query)}

    def grants(self, name: str) -> Grants | None:
        """Return the grants of `name`, with today's groups and tags; None unless it is active."""
        with self._transactions.reading() as db:
            return grants_of(db, name, time.time())

    def all_grants(self) -> list[Grants]:
        """Return the grants of every active identity, by name."""
        with self._transactions.reading() as db:
            return all_grants(db, time.time())

    def allow(self, app: str, targets: Sequence[str]) -> None:
        """Let an app prompt more devices, and let them receive its events.

        A target is a device, a group, or a tag ``key=value``.

        Raises:
            IdentityError: `app` is no app, or a target is neither a device nor a group nor a tag.
        """
        self._transactions.write(lambda db: allow(db, self.actor, app, targets))

    def disallow(self, app: str, targets: Sequence[str]) -> None:
        """Withdraw targets that an app was allowed.

        Raises:
            IdentityError: `app` is no app, or was not allowed one of them.
        """
        self._transactions.write(lambda db: disallow(db, self.actor, app, targets))

    def tag(self, device: str, tags: Mapping[str, str], remove: Sequence[str] = ()) -> None:
        """Set tags of a device, and remove those whose keys are in `remove`.

        Raises:
            UnknownDeviceError: it is not enrolled.
            IdentityError: it does not have a tag that is to be removed.
        """
        self._transactions.write(lambda db: change_tags(db, self.actor, device, tags, remove))

    def knows_certificate(self, name: str, fingerprint: str) -> bool:
        """Whether the certificate of `name` with this SHA-256 (of its DER, in hex) is valid."""
        with self._transactions.reading() as db:
            return knows_certificate(db, name, fingerprint)

    def admitted(self, name: str, fingerprint: str) -> Grants | None:
        """Return the grants of `name`; None unless it is active and the certificate valid."""
        with self._transactions.reading() as db:
            if not knows_certificate(db, name, fingerprint):
                return None
            return grants_of(db, name, time.time())

    def admitted_holders(self, holders: Sequence[tuple[str, str]]) -> list[Grants | None]:
        """Return `admitted` for each name and fingerprint, from one snapshot.

        The number of queries does not grow with the number of holders.
        """
        with self._transactions.reading() as db:
            fingerprints = valid_fingerprints(db, [fingerprint for _, fingerprint in holders])
            names = [name for name, fingerprint in holders if fingerprint in fingerprints[name]]
            grants = {each.name: each for each in grants_of_names(db, names, time.time())}
            return [
                grants.get(name) if fingerprint in fingerprints[name] else None
                for name, fingerprint in holders
            ]

    def revoked_certificates(self, now: float | None = None) -> list[RevokedCertificate]:
        """Return the certificates of the revocation list, by serial.

        They are revoked or on hold, and have not expired yet.
        """
        with self._transactions.reading() as db:
            return revoked_certificates(db, time.time() if now is None else now)

    def denied(self, now: float | None = None, limit: int = MAX_DENIED) -> list[str]:
        """Return the devices that are suspended, revoked, deleted or expired.

        At most `limit`, those first whose certificates are valid longest.
        """
        query = (
            select(IdentityRecord.name)
            .where(has_device_role(), is_denied(time.time() if now is None else now))
            .order_by(IdentityRecord.not_after.desc(), IdentityRecord.name)
            .limit(limit)
        )
        with self._transactions.reading() as db:
            return list(db.scalars(query))


def _unknown_identity(name: str) -> UnknownDeviceError:
    return UnknownDeviceError(
        f"unknown identity {name[:80]!r}: it is not enrolled; see 'fleet identities', or "
        "enrol it with 'fleet enroll'"
    )


def _identity_row(
    record: IdentityRecord, targets: Sequence[str], tags: dict[str, str]
) -> IdentityRow:
    return IdentityRow(
        name=record.name,
        role=record.role,
        group=record.group,
        targets=tuple(targets),
        fingerprint=record.fingerprint,
        created_at=record.created_at,
        not_after=record.not_after,
        state=state_at(record.state, record.not_after, time.time()),
        tags=tags,
    )
