"""The engine of roll-outs: a periodic task that applies their next steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from fleet.registry.store import Registry

PERIOD_S: Final = 2.0


class RolloutEngine:
    """The task that applies the next step of every open roll-out. Its state is in the registry."""

    def __init__(
        self,
        registry: Registry,
        clock: Callable[[], float] = time.time,
        period_s: float = PERIOD_S,
    ) -> None:
        self._rollouts = registry.rollouts
        self._clock = clock
        self._period_s = period_s
        self._receiving_since = clock()
        self._next_at = self._receiving_since

    def step(self) -> None:
        """Apply the steps that are pending, unless the last call was less than a period ago.

        Raises:
            RegistryError: the registry is not available.
        """
        now = self._clock()
        if now >= self._next_at:
            self._next_at = now + self._period_s
            self._rollouts.apply_steps(now, self._receiving_since)
