"""The repository of bundles and their roll-outs."""

from __future__ import annotations

import time

import msgspec
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from fleet.errors import RolloutError, UnknownRolloutError
from fleet.registry.audit import audit
from fleet.registry.models import BundleRecord, RolloutRecord
from fleet.registry.results import BundleRow, RolloutRow, bundle_label
from fleet.registry.rollouts.assessment import pending_steps, rollout_row, rollout_rows
from fleet.registry.rollouts.bundle_names import check_new_name, find_bundle
from fleet.registry.rollouts.bundles import (
    bundle_rows,
    desired_bundles,
    missing_worker,
    serving_workers,
)
from fleet.registry.rollouts.plan import RolloutPlan, RolloutProgress, check_plan, next_stage
from fleet.registry.rollouts.records import (
    BY_HAND,
    candidates,
    open_rollouts,
    progress_of,
    subject_of,
    transition,
)
from fleet.registry.rollouts.removal import check_removable
from fleet.registry.rollouts.states import RolloutEvent, RolloutState, next_rollout_state
from fleet.registry.rollouts.steps import apply_step, restore_previous
from fleet.registry.rollouts.way_back import no_way_back, plan_back, previous_bundle
from fleet.registry.transactions import Repository


class RolloutRepository(Repository):
    """The bundles that the server offers, and their roll-outs.

    Each method is one transaction, except `apply_steps`.
    """

    def add_bundle(self, bundle_id: str, model: str, num_bytes: int) -> bool:
        """Record that the server has a bundle's files; return False when it was recorded before."""
        now = time.time()

        def work(db: Session) -> bool:
            record = db.get(BundleRecord, bundle_id)
            if record is not None and record.removed_at is None:
                return False
            record = record or BundleRecord(bundle_id=bundle_id)
            record.model = model[:200]
            record.num_bytes = num_bytes
            record.added_at = now
            record.removed_at = None
            db.add(record)
            subject = f"bundle:{bundle_id}"
            audit(db, self.actor, "bundle", subject, model=model, num_bytes=num_bytes)
            return True

        return self._transactions.write(work)

    def find_bundle(self, bundle: str) -> str:
        """Return the id of a bundle, given its id, its name or the beginning of its id.

        Raises:
            RolloutError: no bundle matches, or several do.
        """
        with self._transactions.reading() as db:
            return find_bundle(db, bundle).bundle_id

    def check_bundle_name(self, name: str, bundle_id: str) -> None:
        """Raise RolloutError when a name is not plain, or that of another bundle."""
        with self._transactions.reading() as db:
            check_new_name(db, name, bundle_id)

    def rename_bundle(self, bundle: str, name: str) -> str:
        """Give a bundle a name; return its id.

        Raises:
            RolloutError: it is unknown, or the name is not plain, or that of another bundle.
        """

        def work(db: Session) -> str:
            _lock_bundles(db)
            record = find_bundle(db, bundle)
            check_new_name(db, name, record.bundle_id)
            subject = f"bundle:{record.bundle_id}"
            audit(db, self.actor, "bundle_name", subject, name=name, before=record.name)
            record.name = name
            return record.bundle_id

        return self._transactions.write(work)

    def remove_bundle(
        self, bundle: str, *, own_bundle: str | None = None, force: bool = False
    ) -> str:
        """Record that the server offers a bundle no more; return its id. Its name is free again.

        `own_bundle` is the bundle that the fleet serves by its configuration.

        Raises:
            RolloutError: it is unknown, or needed; without `force` also for a way back.
        """
        now = time.time()

        def work(db: Session) -> str:
            _lock_bundles(db)
            record = find_bundle(db, bundle)
            if record.bundle_id == own_bundle:
                raise RolloutError(
                    f"bundle {bundle_label(record.bundle_id, record.name)} is not removed: the "
                    "fleet serves it by its configuration; start it with another --bundle first"
                )
            check_removable(db, record, now, force=force)
            subject = f"bundle:{record.bundle_id}"
            details = {"name": record.name, "model": record.model, "num_bytes": record.num_bytes}
            audit(db, self.actor, "bundle_remove", subject, **details)
            record.name = None
            record.removed_at = now
            return record.bundle_id

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

    def start(self, bundle: str, plan: RolloutPlan, now: float | None = None) -> int:
        """Start a roll-out, which waits until the engine begins it; return its id.

        `bundle` is an id, a name, or the beginning of an id.

        Raises:
            RolloutError: the plan is not usable, the bundle is unknown, there is no such device, or
                another roll-out is open over some of them.
        """
        at = now or time.time()
        plan = check_plan(plan)
        return self._transactions.write(lambda db: add_rollout(db, self.actor, bundle, plan, at))

    def roll_back(
        self, rollout: int | None, *, at_once: bool = False, now: float | None = None
    ) -> int:
        """Undo an open roll-out. After a completed one, start a roll-out of the previous bundle.

        None stands for the open roll-out, or for the newest if none is open. The new roll-out has
        the same plan; with `at_once` it has neither stages nor limits. Return the id of the
        roll-out that was undone or started.

        Raises:
            RolloutError: no roll-out matches, several are open, its state is another one, or the
                previous bundle is not known or was removed.
        """
        at = now or time.time()

        def work(db: Session) -> int:
            record = _rollout_to_undo(db, rollout)
            if record.state != RolloutState.COMPLETED:
                return self._change(db, record, RolloutEvent.UNDO, at)
            progress = progress_of(record)
            previous = previous_bundle(progress, record.bundle_id)
            if previous is None:
                raise no_way_back(record.id)
            plan = plan_back(progress.plan, at_once=at_once)
            return add_rollout(db, self.actor, previous, plan, at)

        return self._transactions.write(work)

    def change(self, rollout: int | None, event: RolloutEvent, now: float | None = None) -> int:
        """Pause, resume or undo a roll-out, and return its id. None stands for the open one.

        Raises:
            RolloutError: no roll-out is open, several are, or its state does not allow the change.
        """
        at = now or time.time()

        def work(db: Session) -> int:
            number = only_open_rollout(db) if rollout is None else rollout
            return self._change(db, _locked_rollout(db, number), event, at)

        return self._transactions.write(work)

    def _change(self, db: Session, record: RolloutRecord, event: RolloutEvent, now: float) -> int:
        # Before anything is restored.
        next_rollout_state(record.id, RolloutState(record.state), event)
        if event is RolloutEvent.UNDO:
            restore_previous(db, self.actor, record)
        transition(db, self.actor, record=record, event=event, reason=BY_HAND, now=now)
        return record.id

    def apply_steps(self, now: float, receiving_since: float) -> None:
        """Apply the next steps, each in its transaction, from statuses since `receiving_since`."""
        with self._transactions.reading() as db:
            steps = pending_steps(db, now, receiving_since)
        for step in steps:
            self._transactions.write(lambda db, step=step: apply_step(db, step, now))  # type: ignore[misc]

    def latest(
        self, now: float | None = None, limit: int = 20, *, before: int | None = None
    ) -> list[RolloutRow]:
        """Return the latest roll-outs, newest first, with the progress of the open ones.

        Only those whose ids are below `before`, where it is given.
        """
        with self._transactions.reading() as db:
            return rollout_rows(db, now or time.time(), limit, before=before)

    def get(self, rollout: int, now: float | None = None) -> RolloutRow:
        """Return one roll-out. Raises UnknownRolloutError."""
        with self._transactions.reading() as db:
            record = db.get(RolloutRecord, rollout)
            if record is None:
                raise _unknown_rollout(rollout)
            return rollout_row(db, record, now or time.time())


def add_rollout(db: Session, actor: str, bundle: str, plan: RolloutPlan, now: float) -> int:
    """Start a roll-out as `RolloutRepository.start`, in one transaction; return its id."""
    _lock_bundles(db)
    bundle_id = find_bundle(db, bundle).bundle_id
    _check_overlap(db, plan)
    _check_devices(db, plan, now)
    record = RolloutRecord(
        bundle_id=bundle_id,
        state=RolloutState.WAITING,
        stage=0,
        plan=msgspec.to_builtins(RolloutProgress(plan)),
        reason=missing_worker(db, bundle_id),
        started_at=now,
        stage_at=now,
        ended_at=None,
    )
    db.add(record)
    db.flush()
    details = {"bundle": bundle_id, "plan": msgspec.to_builtins(plan)}
    audit(db, actor, "rollout", subject_of(record), **details)
    return record.id


def _lock_bundles(db: Session) -> None:
    """Lock every bundle: one start, renaming or removal at a time."""
    ordered = select(BundleRecord.bundle_id).order_by(BundleRecord.bundle_id)
    db.execute(ordered.with_for_update())


def _locked_rollout(db: Session, rollout: int) -> RolloutRecord:
    record = db.get(RolloutRecord, rollout, with_for_update=True, populate_existing=True)
    if record is None:
        raise _unknown_rollout(rollout)
    return record


def _unknown_rollout(rollout: int) -> UnknownRolloutError:
    return UnknownRolloutError(f"unknown roll-out {rollout}; see 'fleet bundle status'")


def _rollout_to_undo(db: Session, rollout: int | None) -> RolloutRecord:
    """Return a roll-out. None stands for the open one, or for the newest if none is open."""
    if rollout is None and not open_rollouts(db):
        rollout = db.scalar(select(func.max(RolloutRecord.id)))
    return _locked_rollout(db, only_open_rollout(db) if rollout is None else rollout)


def only_open_rollout(db: Session) -> int:
    """Return the id of the open roll-out.

    Raises:
        RolloutError: none or more than one is open.
    """
    ids = [record.id for record in open_rollouts(db)]
    if not ids:
        raise RolloutError("no roll-out is open; see 'fleet bundle status'")
    if len(ids) > 1:
        raise RolloutError(f"open roll-outs are {', '.join(map(str, ids))}; name one of them")
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
        where = f" in the group {group!r}" if group else ""
        raise RolloutError(f"no active device{where}; see 'fleet devices'")
