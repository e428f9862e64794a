"""Bundles that the server hands out: who serves each, and who is wanted on it."""

from __future__ import annotations

import time
from collections import Counter, defaultdict

from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet.errors import RolloutError
from fleet.registry.audit import audit
from fleet.registry.models import BundleRecord, RolloutRecord, StatusRecord, WorkerRecord
from fleet.registry.results import BundleRow
from fleet.registry.rollouts.states import OPEN
from fleet.registry.settings import desired_configs


def add_bundle(db: Session, actor: str, bundle_id: str, model: str, num_bytes: int) -> bool:
    """Writes that its files are there; False when that was known."""
    if db.get(BundleRecord, bundle_id) is not None:
        return False
    db.add(
        BundleRecord(
            bundle_id=bundle_id, model=model[:200], num_bytes=num_bytes, added_at=time.time()
        )
    )
    audit(db, actor, "bundle", f"bundle:{bundle_id}", model=model, num_bytes=num_bytes)
    return True


def check_bundle(db: Session, bundle_id: str) -> None:
    """Raises RolloutError, which names those that there are, when the bundle was not added."""
    if db.get(BundleRecord, bundle_id) is None:
        known = (
            ", ".join(db.scalars(select(BundleRecord.bundle_id).order_by(BundleRecord.bundle_id)))
            or "none"
        )
        raise RolloutError(
            f"unknown bundle {bundle_id[:80]!r}: there are {known}; add it with 'fleet bundle add DIR'"
        )


def serving_workers(db: Session) -> dict[str, list[str]]:
    """The workers, by bundle, that are online and take sessions."""
    serving = defaultdict(list)
    query = (
        select(WorkerRecord)
        .where(WorkerRecord.online, ~WorkerRecord.draining)
        .order_by(WorkerRecord.worker)
    )
    for worker in db.scalars(query):
        for bundle_id in worker.bundle_ids:
            serving[bundle_id].append(worker.worker)
    return dict(serving)


def wanted_bundles(db: Session) -> Counter[str]:
    """How many devices are wanted on each bundle; 0 for one that only an open roll-out wants, or that is still used."""
    wanted = Counter(
        dict.fromkeys(db.scalars(select(StatusRecord.bundle_id).where(StatusRecord.online)), 0)
    )
    query = select(RolloutRecord.bundle_id).where(RolloutRecord.state.in_(OPEN))
    wanted.update(dict.fromkeys(db.scalars(query), 0))
    wanted.update(
        config.settings.bundle for config in desired_configs(db).values() if config.settings.bundle
    )
    return wanted


def bundle_rows(db: Session) -> list[BundleRow]:
    """Every bundle, the newest first."""
    wanted = wanted_bundles(db)
    workers = serving_workers(db)
    served = Counter(db.scalars(select(StatusRecord.bundle_id).where(StatusRecord.online)))
    rollouts = {
        record.bundle_id: record
        for record in db.scalars(
            select(RolloutRecord).where(RolloutRecord.state.in_(OPEN)).order_by(RolloutRecord.id)
        )
    }
    return [
        BundleRow(
            bundle_id=record.bundle_id,
            model=record.model,
            num_bytes=record.num_bytes,
            added_at=record.added_at,
            devices=served[record.bundle_id],
            wanted=wanted[record.bundle_id],
            workers=tuple(workers.get(record.bundle_id, ())),
            rollout=rollouts[record.bundle_id].id if record.bundle_id in rollouts else None,
            rollout_state=rollouts[record.bundle_id].state if record.bundle_id in rollouts else "",
        )
        for record in db.scalars(
            select(BundleRecord).order_by(BundleRecord.added_at.desc(), BundleRecord.bundle_id)
        )
    ]
