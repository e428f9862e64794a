"""The audit log: each change is written in the same transaction as its entry."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from fleet.registry.models import AuditRecord
from fleet.registry.results import AuditRow
from fleet.registry.transactions import Repository


def audit(db: Session, actor: str, action: str, subject: str, **details: Any) -> None:
    """Record that `actor` did `action` to `subject`; `details` are builtins, and never a secret."""
    entry = AuditRecord(
        at=time.time(), actor=actor[:200], action=action, subject=subject[:200], details=details
    )
    db.add(entry)


class AuditLog(Repository):
    """The entries of the audit log."""

    def add(self, action: str, subject: str, **details: Any) -> None:
        """Record an event that changes no row; as `audit`."""
        self._transactions.write(lambda db: audit(db, self.actor, action, subject, **details))

    def newest_change(self) -> int:
        """Return a number that grows with every change; 0 before the first."""
        with self._transactions.reading() as db:
            return db.scalar(select(func.max(AuditRecord.id))) or 0

    def entries(
        self,
        subject: str | None = None,
        since: float | None = None,
        limit: int = 100,
        action: str | None = None,
    ) -> list[AuditRow]:
        """Return the latest changes, newest first.

        Only those of `subject`, at `since` or later, and of this `action`, where they are given.
        """
        rows = self.numbered_entries(subject, since, limit, action=action).values()
        return list(rows)

    def numbered_entries(
        self,
        subject: str | None = None,
        since: float | None = None,
        limit: int = 100,
        *,
        action: str | None = None,
        before: int | None = None,
    ) -> dict[int, AuditRow]:
        """Return changes as `entries`, by their numbers; only those `before` a number."""
        query = select(AuditRecord).order_by(AuditRecord.id.desc()).limit(limit)
        if subject is not None:
            query = query.where(AuditRecord.subject == subject)
        if since is not None:
            query = query.where(AuditRecord.at >= since)
        if action is not None:
            query = query.where(AuditRecord.action == action)
        if before is not None:
            query = query.where(AuditRecord.id < before)
        with self._transactions.reading() as db:
            return {record.id: _audit_row(record) for record in db.scalars(query)}


def _audit_row(record: AuditRecord) -> AuditRow:
    return AuditRow(
        at=record.at,
        actor=record.actor,
        action=record.action,
        subject=record.subject,
        details=record.details,
    )
