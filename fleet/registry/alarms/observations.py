"""Observations of the fleet, from which the conditions of alarms follow: a few queries each."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache
from typing import Any, Final, NamedTuple

from sqlalchemy import BigInteger, ColumnElement, and_, case, cast, func, select
from sqlalchemy.orm import Session

from fleet.protocol.modes import Mode
from fleet.protocol.types import DAY_S
from fleet.registry.identities.devices import has_device_role
from fleet.registry.identities.lifecycle import IdentityState
from fleet.registry.models import (
    BundleRecord,
    CertificateRecord,
    IdentityRecord,
    RolloutRecord,
    StatusRecord,
    WorkerRecord,
)
from fleet.registry.rollouts.bundles import serving_workers
from fleet.registry.rollouts.records import BY_HAND
from fleet.registry.rollouts.states import OPEN, RolloutState
from fleet.registry.settings import newest_versions, targets_with_thresholds, wanted_version
from fleet.registry.stats.rollup_columns import HOUR_S
from fleet.registry.stats.rollup_tables import ROLLUPS
from fleet.registry.stats.rollups import span_start
from fleet.registry.targets import Target

STOPPED_ROLLOUT_S: Final = 7.0 * DAY_S
"""The time for which a stopped roll-out is observed."""


class ObservedDevice(NamedTuple):
    """An active device that has published a status.

    `wanted_version` is the version of its desired settings; `problem` says why it does not follow
    them, None without one.
    """

    name: str
    group: str | None
    online: bool
    mode: str
    bundle_id: str
    last_seen: float
    config_version: int
    wanted_version: int
    problem: str | None


class ObservedCounts(NamedTuple):
    """The sums of a device's answers in this hour and the one before.

    `joint_tokens` are those of answers for which the device may use the cloud. `judged` and
    `agreed` are those of the bundle that it serves now, without the answers in mode `verified`.
    """

    answers: int
    errors: int
    tokens: int
    cloud_tokens: int
    joint_tokens: int
    fallback_tokens: int
    judged: int
    agreed: int


class ObservedCertificate(NamedTuple):
    """The certificate of an active identity; `begin` is None for one that is not recorded.

    Times are in seconds since 1970.
    """

    name: str
    role: str
    group: str | None
    begin: float | None
    end: float


class StoppedRollout(NamedTuple):
    """A roll-out that was undone or failed, not by hand, with none after it over its devices."""

    id: int
    bundle_id: str
    group: str | None
    reason: str


class FleetObservation(NamedTuple):
    """The fleet at one moment: `needed_bundles` are those for which online devices use the cloud.

    `counts` are by device, `sessions` by worker. Every bundle is one that the server offers.
    `threshold_targets` reads the targets whose settings have thresholds, as long as the
    transaction is open.
    """

    devices: list[ObservedDevice]
    counts: dict[str, ObservedCounts]
    certificates: list[ObservedCertificate]
    rollouts: list[StoppedRollout]
    needed_bundles: list[str]
    served_bundles: Collection[str]
    sessions: dict[str, int]
    threshold_targets: Callable[[], Collection[Target]]


def observe_fleet(db: Session, now: float, certificate_days: float) -> FleetObservation:
    """Return the fleet at `now`, with the certificates that end within `certificate_days`."""
    devices = _devices(db)
    return FleetObservation(
        devices=devices,
        counts=_counts(db, now),
        certificates=_certificates(db, now + certificate_days * DAY_S),
        rollouts=_stopped_rollouts(db, now),
        needed_bundles=_needed_bundles(db, devices),
        served_bundles=serving_workers(db).keys(),
        sessions=_sessions(db),
        threshold_targets=cache(lambda: targets_with_thresholds(db)),
    )


def _devices(db: Session) -> list[ObservedDevice]:
    status = StatusRecord
    query = (
        select(
            IdentityRecord.name,
            IdentityRecord.group,
            status.online,
            status.mode,
            status.bundle_id,
            status.last_seen,
            status.config_version,
            status.config_error,
        )
        .join(status, status.device == IdentityRecord.name)
        .where(has_device_role(), IdentityRecord.state == IdentityState.ACTIVE)
        .order_by(IdentityRecord.name)
    )
    versions = newest_versions(db)
    return [
        ObservedDevice(
            name=row.name,
            group=row.group,
            online=row.online,
            mode=row.mode,
            bundle_id=row.bundle_id,
            last_seen=row.last_seen,
            config_version=row.config_version,
            wanted_version=wanted_version(versions, row.name, row.group),
            problem=_message(row.config_error),
        )
        for row in db.execute(query)
    ]


def _message(error: dict[str, Any] | None) -> str | None:
    return None if error is None else str(error.get("message", ""))


def _counts(db: Session, now: float) -> dict[str, ObservedCounts]:
    counts = ROLLUPS.c
    is_judged = and_(counts.mode != Mode.VERIFIED, counts.bundle_id == StatusRecord.bundle_id)
    sums = (
        counts.answers,
        counts.errors,
        counts.tokens,
        counts.cloud_tokens,
        _where(counts.mode != Mode.STANDALONE, counts.tokens),
        _where(counts.mode != Mode.STANDALONE, counts.fallback_tokens),
        _where(is_judged, counts.judged),
        _where(is_judged, counts.agreed),
    )
    this_hour = span_start(now, HOUR_S)
    query = (
        select(counts.device, *(cast(func.sum(column), BigInteger) for column in sums))
        .join(StatusRecord, StatusRecord.device == counts.device)
        .where(counts.span_s == HOUR_S, counts.start.in_((this_hour - HOUR_S, this_hour)))
        .group_by(counts.device)
    )
    return {device: ObservedCounts(*columns) for device, *columns in db.execute(query)}


def _where(condition: ColumnElement[bool], amount: ColumnElement[int]) -> ColumnElement[int]:
    return case((condition, amount), else_=0)


def _certificates(db: Session, before: float) -> list[ObservedCertificate]:
    identity = IdentityRecord
    query = (
        select(
            identity.name,
            identity.role,
            identity.group,
            CertificateRecord.not_before,
            identity.not_after,
        )
        .outerjoin(CertificateRecord, CertificateRecord.fingerprint == identity.fingerprint)
        .where(identity.state == IdentityState.ACTIVE, identity.not_after <= before)
        .order_by(identity.name)
    )
    return [ObservedCertificate(*row) for row in db.execute(query)]


def _stopped_rollouts(db: Session, now: float) -> list[StoppedRollout]:
    """Return the stopped roll-outs; the devices that a plan names are not read."""
    rollout = RolloutRecord
    group = rollout.plan["plan"]["group"].as_string()
    is_stopped = and_(
        rollout.state.in_((RolloutState.UNDONE, RolloutState.FAILED)),
        rollout.reason != BY_HAND,
        rollout.ended_at >= now - STOPPED_ROLLOUT_S,
    )
    oldest = db.scalar(select(func.min(rollout.id)).where(is_stopped))
    if oldest is None:
        return []
    columns = (rollout.id, rollout.bundle_id, group, rollout.reason, is_stopped)
    rows = db.execute(select(*columns).where(rollout.id >= oldest).order_by(rollout.id.desc()))
    stopped = []
    later: set[str | None] = set()
    for id_, bundle_id, own_group, reason, was_stopped in rows:
        is_newest = not later if own_group is None else later.isdisjoint({None, own_group})
        if was_stopped and is_newest:
            stopped.append(StoppedRollout(id_, bundle_id, own_group, reason))
        later.add(own_group)
    return stopped


def _needed_bundles(db: Session, devices: list[ObservedDevice]) -> list[str]:
    """Return the offered bundles that online devices serve with the cloud, or a roll-out brings."""
    offered = set(
        db.scalars(select(BundleRecord.bundle_id).where(BundleRecord.removed_at.is_(None)))
    )
    needed = {each.bundle_id for each in devices if each.online and each.mode != Mode.STANDALONE}
    needed.update(db.scalars(select(RolloutRecord.bundle_id).where(RolloutRecord.state.in_(OPEN))))
    return sorted(needed & offered)


def _sessions(db: Session) -> dict[str, int]:
    worker = WorkerRecord
    query = select(worker.worker, worker.num_sessions).where(worker.online)
    return {row.worker: row.num_sessions for row in db.execute(query.order_by(worker.worker))}
