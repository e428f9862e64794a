"""Queries about the bundles that the server offers: their workers and their devices."""

from __future__ import annotations

from collections import Counter, defaultdict

from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet.registry.models import BundleRecord, StatusRecord, WorkerRecord
from fleet.registry.results import BundleRow
from fleet.registry.rollouts.records import open_rollouts
from fleet.registry.settings import desired_configs


def serving_workers(db: Session) -> dict[str, list[str]]:
    """Return the workers that are online and accept sessions, by bundle."""
    workers = defaultdict(list)
    query = select(WorkerRecord).where(WorkerRecord.online, ~WorkerRecord.draining)
    for worker in db.scalars(query.order_by(WorkerRecord.worker)):
        for bundle_id in worker.bundle_ids:
            workers[bundle_id].append(worker.worker)
    return dict(workers)


def missing_worker(db: Session, bundle_id: str) -> str:
    """Return why a roll-out waits for a worker; "" when a worker serves the bundle."""
    if bundle_id in serving_workers(db):
        return ""
    advice = "'fleet up' starts one; elsewhere start one with --bundle"
    return f"no worker serves bundle {bundle_id}: {advice}"


def desired_bundles(db: Session) -> Counter[str]:
    """Return the number of devices whose desired settings name each bundle.

    0 for a bundle that a device serves, or that only an open roll-out brings.
    """
    served = db.scalars(select(StatusRecord.bundle_id).where(StatusRecord.online))
    counts = Counter(dict.fromkeys(served, 0))
    counts.update(dict.fromkeys((record.bundle_id for record in open_rollouts(db)), 0))
    settings = [config.settings for config in desired_configs(db).values()]
    counts.update(each.bundle for each in settings if each.bundle)
    return counts


def bundle_rows(db: Session) -> list[BundleRow]:
    """Return every bundle that the server offers, the newest first."""
    desired = desired_bundles(db)
    workers = serving_workers(db)
    served = Counter(db.scalars(select(StatusRecord.bundle_id).where(StatusRecord.online)))
    rollouts = {record.bundle_id: record.id for record in open_rollouts(db)}
    states = {record.bundle_id: record.state for record in open_rollouts(db)}
    offered = select(BundleRecord).where(BundleRecord.removed_at.is_(None))
    newest_first = offered.order_by(BundleRecord.added_at.desc(), BundleRecord.bundle_id)
    return [
        BundleRow(
            bundle_id=record.bundle_id,
            name=record.name,
            model=record.model,
            num_bytes=record.num_bytes,
            added_at=record.added_at,
            devices=served[record.bundle_id],
            wanted=desired[record.bundle_id],
            workers=tuple(workers.get(record.bundle_id, ())),
            rollout=rollouts.get(record.bundle_id),
            rollout_state=states.get(record.bundle_id, ""),
        )
        for record in db.scalars(newest_first)
    ]
