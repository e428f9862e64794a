"""The repository of bundles and their roll-outs."""

from __future__ import annotations

import time

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet.errors import RolloutError
from fleet.registry.audit import audit
from fleet.registry.models import BundleRecord, RolloutRecord
from fleet.registry.results import BundleRow, RolloutRow
from fleet.registry.rollouts.assessment import pending_steps, rollout_rows
from fleet.registry.rollouts.bundles import (
    bundle_rows,
    check_bundle,
    desired_bundles,
    missing_worker,
    serving_workers,
)
from fleet.registry.rollouts.plan import RolloutPlan, RolloutProgress, check_plan, next_stage
from fleet.registry.rollouts.records import (
    candidates,
    open_rollouts,
    progress_of,
    subject_of,
    transition,
)
from fleet.registry.rollouts.states import RolloutEvent, RolloutState, next_rollout_state
from fleet.registry.rollouts.steps import apply_step, restore_previous
from fleet.registry.transactions import Repository


class RolloutRepository(Repository):
    """The bundles that the server offers, and their roll-outs.

    Each method is one transaction, except `apply_steps`.
    """

    def add_bundle(self, bundle_id: str, model: str, num_bytes: int) -> bool:
        """Record that the server has a bundle's files; return False when it was recorded before."""
        now = time.time()

        def work(db: Session) -> bool:
            if db.get(BundleRecord, bundle_id) is not None:
                return False
            record = BundleRecord(
                bundle_id=bundle_id, model=model[:200], num_bytes=num_bytes, added_at=now
            )
            db.add(record)
            subject = f"bundle:{bundle_id}"
            audit(db, self.actor, "bundle", subject, model=model, num_bytes=num_bytes)
            return True

        return self._transactions.write(work)

    def bundles(self) -> list[BundleRow]:
        """Return every bundle that was added, the newest first."""
        with self._transactions.reading() as db:
            return bundle_rows(db)

    def desired_bundles(self) -> dict[str, int]:
        """Return the number of devices whose desired settings name each bundle.

        0 for a bundle that a device serves, or that only an open roll-out brings.
        """
        with self._transactions.reading() as db:
            return desired_bundles(db)

    def serving_workers(self) -> dict[str, list[str]]:
        """Return the workers that are online and accept sessions, by bundle."""
        with self._transactions.reading() as db:
            return serving_workers(db)

    def start(self, bundle_id: str, plan: RolloutPlan, now: float | None = None) -> int:
        """Start a roll-out, which waits until the engine begins it; return its id.

        Raises:
            RolloutError: the plan is not usable, the bundle is unknown, there is no such device, or
                another roll-out is open over some of them.
        """
        at = now or time.time()
        plan = check_plan(plan)

        def work(db: Session) -> int:
            # One start at a time.
            ordered = select(BundleRecord.bundle_id).order_by(BundleRecord.bundle_id)
            db.execute(ordered.with_for_update())
            check_bundle(db, bundle_id)
            _check_overlap(db, plan)
            _check_devices(db, plan, at)
            record = RolloutRecord(
                bundle_id=bundle_id,
                state=RolloutState.WAITING,
                stage=0,
                plan=msgspec.to_builtins(RolloutProgress(plan)),
                reason=missing_worker(db, bundle_id),
                started_at=at,
                stage_at=at,
                ended_at=None,
            )
            db.add(record)
            db.flush()
            details = {"bundle": bundle_id, "plan": msgspec.to_builtins(plan)}
            audit(db, self.actor, "rollout", subject_of(record), **details)
            return record.id

        return self._transactions.write(work)

    def change(self, rollout: int | None, event: RolloutEvent, now: float | None = None) -> int:
        """Pause, resume or undo a roll-out, with None the one that is open; return its id.

        Raises:
            RolloutError: there is none, more than one, or the change is not legal in its state.
        """
        at = now or time.time()

        def work(db: Session) -> int:
            number = only_open_rollout(db) if rollout is None else rollout
            record = db.get(RolloutRecord, number, with_for_update=True, populate_existing=True)
            if record is None:
                raise RolloutError(f"unknown roll-out {rollout}; see 'fleet bundle status'")
            # Before anything is restored.
            next_rollout_state(record.id, RolloutState(record.state), event)
            if event is RolloutEvent.UNDO:
                restore_previous(db, self.actor, record)
            transition(db, self.actor, record=record, event=event, reason="by hand", now=at)
            return record.id

        return self._transactions.write(work)

    def apply_steps(self, now: float, receiving_since: float) -> None:
        """Apply the next steps, each in its transaction, from statuses since `receiving_since`."""
        with self._transactions.reading() as db:
            steps = pending_steps(db, now, receiving_since)
        for step in steps:
            self._transactions.write(lambda db, step=step: apply_step(db, step, now))  # type: ignore[misc]

    def latest(self, now: float | None = None, limit: int = 20) -> list[RolloutRow]:
        """Return the latest roll-outs, newest first, with the progress of the open ones."""
        with self._transactions.reading() as db:
            return rollout_rows(db, now or time.time(), limit)


def only_open_rollout(db: Session) -> int:
    """Return the id of the open roll-out.

    Raises:
        RolloutError: none or more than one is open.
    """
    ids = [record.id for record in open_rollouts(db)]
    if len(ids) != 1:
        shown = ", ".join(map(str, ids)) or "none"
        raise RolloutError(f"open roll-outs are {shown}; name one of them")
    return ids[0]


def _check_overlap(db: Session, plan: RolloutPlan) -> None:
    """Raise RolloutError when another roll-out is open over some of the plan's devices."""
    for other in open_rollouts(db):
        group = progress_of(other).plan.group
        if None in (plan.group, group) or group == plan.group:
            raise RolloutError(
                f"roll-out {other.id} of bundle {other.bundle_id} is {other.state} over the same "
                f"devices; wait for its end, or undo it with 'fleet bundle rollback {other.id}'"
            )


def _check_devices(db: Session, plan: RolloutPlan, now: float) -> None:
    """Raise RolloutError when the plan has no active device, or its canary's group has none."""
    active = candidates(db, plan.group, now)
    _, first = next_stage(RolloutProgress(plan), 0, active)
    has_canary = not plan.canary_group or any(each.group == plan.canary_group for each in active)
    if not first or not has_canary:
        group = plan.canary_group or plan.group
        where = f"in the group {group!r}" if group else ""
        raise RolloutError(f"no active device {where}; see 'fleet devices'")
