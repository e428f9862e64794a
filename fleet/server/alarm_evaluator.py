"""The evaluation of alarms: a periodic task that compares the fleet with the rules."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final

from fleet.errors import BundleError, FleetError
from fleet.registry.alarms.alarm_kinds import AlarmKind
from fleet.registry.alarms.conditions import BundleFacts, FactsOf
from fleet.registry.alarms.transitions import AlarmCondition, AlarmEvaluation, AlarmKey
from fleet.registry.store import Registry
from fleet.server.home import FleetHome
from fleet.transport.base import Transport

PERIOD_S: Final = 15.0
SETTLE_S: Final = 60.0
"""The time after the start, a new link or an error in which statuses are not complete again."""

JUMP_S: Final = 30.0
"""A greater difference between the wall clock and the monotonic clock is a jump of the former."""

ACTOR: Final = "server"
NEED_THE_LINK: Final = frozenset(AlarmKind) - {AlarmKind.CERTIFICATE, AlarmKind.ROLLOUT}
"""The kinds whose conditions come from messages of devices and workers."""


class AlarmEvaluator:
    """The task that fires and resolves alarms.

    It counts the durations of conditions itself, by `monotonic`: see ADR 0058.
    """

    def __init__(
        self,
        registry: Registry,
        facts_of: FactsOf,
        link: Transport,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._alarms = registry.acting_as(ACTOR).alarms
        self._facts_of = facts_of
        self._link = link
        self._clock = clock
        self._monotonic = monotonic
        self._since: dict[AlarmKey, float] = {}  # the first evaluation that saw each condition
        self._up_at = monotonic()
        self._next_at = self._up_at
        self._offset_s = clock() - self._up_at
        link.on_up(self._settle)

    def _settle(self) -> None:
        self._up_at = self._monotonic()

    def step(self) -> None:
        """Evaluate all rules, unless the last evaluation was less than a period ago.

        Raises:
            RegistryError: the registry is not available.
        """
        now = self._monotonic()
        if now < self._next_at:
            return
        self._next_at = now + PERIOD_S
        try:
            self._evaluate(now)
        except FleetError:  # statuses were not stored, either
            self._settle()
            raise

    def _evaluate(self, now: float) -> None:
        wall = self._clock()
        self._notice_jump(wall - now)
        held = self._held_kinds(now)
        found = self._alarms.conditions(self._facts_of, wall)
        conditions = {key: each for key, each in found.items() if key[0] not in held}
        self._since = {key: self._since.get(key, now) for key in conditions}
        self._alarms.apply(AlarmEvaluation(conditions, self._due(conditions, now), held), wall)

    def _notice_jump(self, offset_s: float) -> None:
        """Begin all durations again after a jump of the wall clock."""
        if abs(offset_s - self._offset_s) > JUMP_S:
            self._since.clear()
        self._offset_s = offset_s

    def _held_kinds(self, now: float) -> frozenset[AlarmKind]:
        is_settled = self._link.is_up and now - self._up_at >= SETTLE_S
        return frozenset() if is_settled else NEED_THE_LINK

    def _due(self, conditions: Mapping[AlarmKey, AlarmCondition], now: float) -> list[AlarmKey]:
        return [key for key, each in conditions.items() if now - self._since[key] >= each.for_s]


def facts_from(home: FleetHome) -> FactsOf:
    """Return the function that reads the facts on a bundle of a fleet from its manifest."""

    def facts_of(bundle_id: str) -> BundleFacts:
        try:
            manifest = home.bundle_manifest(bundle_id)
        except BundleError:  # `fleet doctor` reports it
            manifest = None
        if manifest is None:
            return BundleFacts()
        calibration = manifest.calibration
        promise = calibration.target_agreement if calibration else None
        return BundleFacts(needs_worker=not manifest.is_device_only, promise=promise)

    return facts_of
