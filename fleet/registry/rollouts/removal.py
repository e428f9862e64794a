"""Removal of bundles: the reasons that a bundle is still needed for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet.errors import RolloutError
from fleet.registry.models import BundleRecord, RolloutRecord
from fleet.registry.results import bundle_label
from fleet.registry.rollouts.records import candidates, open_rollouts, progress_of
from fleet.registry.rollouts.states import RolloutState
from fleet.registry.rollouts.way_back import bundles_before, previous_bundle
from fleet.registry.settings import desired_configs, newest_settings
from fleet.registry.targets import Scope, Target
from fleet.utils.printable import count

MAX_NAMES: Final = 3


def check_removable(db: Session, record: BundleRecord, now: float, *, force: bool) -> None:
    """Raise RolloutError when a bundle is needed; with `force` a way back to it does not count."""
    bundle_id = record.bundle_id
    reasons = [*_needs(db, bundle_id, now)]
    if not reasons and not force:
        reasons = [*_ways_back(db, bundle_id)]
    if reasons:
        raise RolloutError(
            f"bundle {bundle_label(bundle_id, record.name)} is not removed: {'; '.join(reasons)}"
        )


def _needs(db: Session, bundle_id: str, now: float) -> Iterator[str]:
    if newest_settings(db, Target(Scope.ALL)).bundle == bundle_id:
        yield "it is the desired bundle of all devices; roll out another one first"
    for rollout in open_rollouts(db):
        before = bundles_before(progress_of(rollout), rollout.bundle_id)
        if bundle_id in {rollout.bundle_id, *before}:
            yield f"roll-out {rollout.id}, which is {rollout.state}, needs it; wait for its end"
    if devices := _devices_with(db, bundle_id, now):
        yield f"{_shown(devices)} or will; roll out another one first"


def _shown(devices: list[str]) -> str:
    names = ", ".join(devices[:MAX_NAMES])
    more = f" and {len(devices) - MAX_NAMES} more" if len(devices) > MAX_NAMES else ""
    verb = "serves" if len(devices) == 1 else "serve"
    return f"{count(len(devices), 'device')} ({names}{more}) {verb} it"


def _devices_with(db: Session, bundle_id: str, now: float) -> list[str]:
    """Return the active devices that serve a bundle, or will when they connect."""
    configs = desired_configs(db)
    desired = {device: config.settings.bundle for device, config in configs.items()}
    return [
        each.device
        for each in candidates(db, None, now)
        if bundle_id == desired[each.device]
        or (bundle_id == each.bundle_id and (each.online or not desired[each.device]))
    ]


def _ways_back(db: Session, bundle_id: str) -> Iterator[str]:
    for record in _newest_completed(db):
        if previous_bundle(progress_of(record), record.bundle_id) == bundle_id:
            command = f"'fleet bundle rollback {record.id}'"
            yield f"{command} goes back to it; --force removes it anyway"


def _newest_completed(db: Session) -> Iterable[RolloutRecord]:
    """Return the newest completed roll-out of each group, and that of all devices."""
    completed = select(RolloutRecord).where(RolloutRecord.state == RolloutState.COMPLETED)
    records = db.scalars(completed.order_by(RolloutRecord.id))
    return {progress_of(record).plan.group: record for record in records}.values()
