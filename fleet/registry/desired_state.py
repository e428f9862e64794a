"""What is wanted of devices: the part of the registry that knows settings, bundles and roll-outs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from fleet.protocol.desired_config import DesiredConfig, Settings
from fleet.registry.bundles import add_bundle, bundle_rows, serving_workers, wanted_bundles
from fleet.registry.results import (
    BundleRow,
    RolloutRow,
)
from fleet.registry.rollouts.assessment import due_steps, rollout_rows
from fleet.registry.rollouts.plan import RolloutPlan
from fleet.registry.rollouts.states import RolloutEvent
from fleet.registry.rollouts.steps import change_rollout, start_rollout, take_step
from fleet.registry.settings import Target, change_settings, current_settings, desired_configs
from fleet.registry.transactions import Part


class DesiredStateRepository(Part):
    """Desired settings, bundles that are handed out, and their roll-outs."""

    def settings(self, target: Target) -> Settings:
        """What was said last for one target alone."""
        with self._transactions.reading() as db:
            return current_settings(db, target)

    def change_settings(self, target: Target, change: Callable[[Settings], Settings]) -> int:
        """Puts ``change(settings)`` in the place of a target's settings; the new version.

        Raises:
            UnknownDeviceError: nobody enrolled the device.
            ConfigError: no device is in the group.
        """
        return self._transactions.write(lambda db: change_settings(db, self.actor, target, change))

    def desired_configs(self, devices: Iterable[str] | None = None) -> dict[str, DesiredConfig]:
        """What is wanted of each device, or of those named; version 0 where nothing was ever said."""
        with self._transactions.reading() as db:
            return desired_configs(db, devices)

    def add_bundle(self, bundle_id: str, model: str, num_bytes: int) -> bool:
        """Keeps that the server has a bundle's files; False when that was known."""
        return self._transactions.write(
            lambda db: add_bundle(db, self.actor, bundle_id, model, num_bytes)
        )

    def bundles(self) -> list[BundleRow]:
        """Every bundle that was added, the newest first."""
        with self._transactions.reading() as db:
            return bundle_rows(db)

    def wanted_bundles(self) -> dict[str, int]:
        """How many devices are wanted on each bundle; 0 for one that is used, or that an open roll-out brings."""
        with self._transactions.reading() as db:
            return wanted_bundles(db)

    def serving_workers(self) -> dict[str, list[str]]:
        """The workers that take sessions, by bundle."""
        with self._transactions.reading() as db:
            return serving_workers(db)

    def start_rollout(self, bundle_id: str, plan: RolloutPlan, now: float | None = None) -> int:
        """Begins to bring a bundle to devices, stage by stage; gives the roll-out's id.

        Raises:
            RolloutError: the plan is not usable, the bundle is unknown, there is no such device, or another roll-out is
                open over some of them.
        """
        at = now or time.time()
        return self._transactions.write(
            lambda db: start_rollout(db, self.actor, bundle_id, plan, at)
        )

    def change_rollout(
        self, rollout: int | None, event: RolloutEvent, now: float | None = None
    ) -> int:
        """Pauses, resumes or undoes a roll-out, None for the open one; gives its id.

        Raises:
            RolloutError: there is none, more than one, or the change is not legal in its state.
        """
        at = now or time.time()
        return self._transactions.write(
            lambda db: change_rollout(db, self.actor, rollout, event, at)
        )

    def step_rollouts(self, now: float, heard_since: float) -> None:
        """Takes every open roll-out a step further; statuses are heard since `heard_since` only."""
        with self._transactions.reading() as db:
            due = due_steps(db, now, heard_since)
        for each in due:
            self._transactions.write(lambda db, each=each: take_step(db, each, now))  # type: ignore[misc]

    def rollouts(self, now: float | None = None, limit: int = 20) -> list[RolloutRow]:
        """The latest roll-outs, newest first, and how far the open ones are."""
        with self._transactions.reading() as db:
            return rollout_rows(db, now or time.time(), limit)
