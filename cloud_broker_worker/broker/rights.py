"""What the registry says of a name, asked at most every two seconds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from fleet.access import Action, Grants

Lookup = Callable[[str], Grants | None]

CACHE_S: Final = 2.0
MAX_CACHED: Final = 10_000

logger = logging.getLogger(__name__)


class Rights:
    """Rights by name, so that a message costs no database query. When the registry fails, nobody has any."""

    def __init__(self, lookup: Lookup, clock: Callable[[], float] = time.monotonic) -> None:
        self._lookup = lookup
        self._clock = clock
        self._known: dict[str, tuple[float, Grants | None]] = {}

    def of(self, name: str) -> Grants | None:
        """The rights of `name`, at most `CACHE_S` seconds old; None when it is not enrolled, or not any more."""
        asked_at, grants = self._known.get(name, (float("-inf"), None))
        if self._clock() - asked_at >= CACHE_S:
            grants = self.fresh(name)
        return grants

    def fresh(self, name: str) -> Grants | None:
        """The rights of `name` now."""
        try:
            grants = self._lookup(name)
        except Exception:
            logger.exception("the registry cannot say what %r may do; it may do nothing", name[:80])
            grants = None
        if len(self._known) >= MAX_CACHED:
            self._known.clear()
        self._known[name] = self._clock(), grants
        return grants

    def may(self, name: str, action: Action, topic: str) -> bool:
        """Whether `name` may publish to a topic, or subscribe to a filter."""
        grants = self.of(name)
        return grants is not None and grants.may(action, topic)
