"""The audit log: each change is written beside what it changes, in the same transaction."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from fleet.registry.models import AuditRecord
from fleet.registry.results import AuditRow


def audit(db: Session, actor: str, action: str, subject: str, **details: Any) -> None:
    """Writes that `actor` did `action` to `subject`; `details` are builtins, and never a secret."""
    db.add(
        AuditRecord(
            at=time.time(), actor=actor[:200], action=action, subject=subject[:200], details=details
        )
    )


def newest_change(db: Session) -> int:
    """Grows with every change; 0 before the first."""
    return db.scalar(select(func.max(AuditRecord.id))) or 0


def audit_log(db: Session, subject: str | None, since: float | None, limit: int) -> list[AuditRow]:
    """The latest changes, newest first."""
    query = select(AuditRecord).order_by(AuditRecord.id.desc()).limit(limit)
    if subject is not None:
        query = query.where(AuditRecord.subject == subject)
    if since is not None:
        query = query.where(AuditRecord.at >= since)
    return [
        AuditRow(
            at=row.at, actor=row.actor, action=row.action, subject=row.subject, details=row.details
        )
        for row in db.scalars(query)
    ]
