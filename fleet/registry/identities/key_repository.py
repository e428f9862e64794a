"""The repository of the keys with which apps use the HTTP API, and of their rights."""

from __future__ import annotations

import time
from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from fleet.errors import IdentityError
from fleet.identity.enrolment import Enrolment, format_tags
from fleet.protocol.access import Role
from fleet.protocol.api_key import ApiKey
from fleet.registry.audit import audit
from fleet.registry.identities.api_keys import (
    add_key,
    check_may_use_keys,
    key_rows,
    revoke_key,
    stored_keys,
)
from fleet.registry.identities.devices import is_device
from fleet.registry.identities.enrolment import enroll
from fleet.registry.identities.grants import (
    allow,
    check_app,
    devices_by_app,
    is_active,
    tags_by_device,
)
from fleet.registry.identities.lifecycle import IdentityChange, IdentityState
from fleet.registry.models import AuditRecord, IdentityRecord
from fleet.registry.results import ApiKeyRow, ApiRights, DeviceLabels
from fleet.registry.transactions import Repository


class ApiKeyRepository(Repository):
    """Keys of apps. Each method is one transaction."""

    def create(
        self, app: str, targets: Sequence[str] = (), expires_at: float | None = None
    ) -> ApiKey:
        """Create a key for an app, which may also prompt `targets` from now on.

        A name that is not enrolled becomes an app without a certificate. `expires_at` is in
        seconds since 1970. The secret of the key is not stored.

        Raises:
            IdentityError: `app` is no app, or not enrolled and has no targets; a target is neither
                a device nor a group nor a tag.
            StateError: the app is suspended or revoked.
            ConfigError: the app has too many keys.
        """
        now = time.time()

        def work(db: Session) -> ApiKey:
            self._prepare_app(db, app, targets)
            key = add_key(db, app, expires_at, now)
            audit(db, self.actor, "key_create", app, key=key.id, expires_at=expires_at)
            return key

        return self._transactions.write(work)

    def _prepare_app(self, db: Session, app: str, targets: Sequence[str]) -> None:
        record = db.get(IdentityRecord, app, with_for_update=True)
        if record is not None and record.state != IdentityState.DELETED:
            check_app(db, app)
            check_may_use_keys(record)
            if targets:
                allow(db, self.actor, app, targets)
            return
        if not targets:
            raise IdentityError(
                f"unknown app {app[:80]!r}: it is not enrolled; to enrol it, give the devices that "
                "it may prompt with --allow"
            )
        enroll(db, Enrolment(name=app, role=Role.APP, targets=tuple(targets)), replace=False)
        role = Role.APP.value
        audit(db, self.actor, IdentityChange.ENROLL, app, role=role, allow=list(targets))

    def revoke(self, key_id: str) -> str:
        """Revoke a key for good; return the name of its app.

        Raises:
            CredentialsError: there is no key of this id.
        """
        now = time.time()

        def work(db: Session) -> str:
            app = revoke_key(db, key_id, now)
            audit(db, self.actor, "key_revoke", app, key=key_id)
            return app

        return self._transactions.write(work)

    def all(self, app: str | None = None) -> list[ApiKeyRow]:
        """Return every key, or every key of one app; also those that are revoked or expired."""
        with self._transactions.reading() as db:
            return key_rows(db, app, time.time())

    def rights(self) -> ApiRights:
        """Return the keys that may be used and the rights of their apps, from one snapshot."""
        now = time.time()
        with self._transactions.reading() as db:
            change = db.scalar(select(func.max(AuditRecord.id))) or 0
            devices = db.scalars(select(IdentityRecord).where(is_device())).all()
            allowed = devices_by_app(db, devices)
            tags = tags_by_device(db)
            keys = stored_keys(db, now)
        active = {
            each.name: DeviceLabels(each.group, tuple(format_tags(tags.get(each.name, {}))))
            for each in devices
            if is_active(each, now)
        }
        apps = {key.app for key in keys.values()}
        devices_of = {app: tuple(sorted(allowed.get(app, set()) & active.keys())) for app in apps}
        return ApiRights(change=change, keys=keys, devices_of=devices_of, devices=active)
