"""What the registry says of who holds a certificate, asked at most every two seconds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from fleet.protocol.access import Action, Grants

CACHE_S: Final = 2.0
MAX_CACHED: Final = 10_000

logger = logging.getLogger(__name__)


class CertificateHolder(NamedTuple):
    """Who shows a certificate: its CN, and the SHA-256 of its DER in hex."""

    name: str
    fingerprint: str


Lookup = Callable[[str, str], Grants | None]
"""By name and fingerprint; None for who is not enrolled, and for a certificate that does not count."""


class RightsCache:
    """Rights by holder, so that a message costs no database query. When the registry fails, nobody has any."""

    def __init__(self, lookup: Lookup, clock: Callable[[], float] = time.monotonic) -> None:
        self._lookup = lookup
        self._clock = clock
        self._known: dict[CertificateHolder, tuple[float, Grants | None]] = {}

    def of(self, holder: CertificateHolder) -> Grants | None:
        """The rights of `holder`, at most `CACHE_S` seconds old; None when it has none, or none any more."""
        asked_at, grants = self._known.get(holder, (float("-inf"), None))
        if self._clock() - asked_at >= CACHE_S:
            grants = self.fresh(holder)
        return grants

    def fresh(self, holder: CertificateHolder) -> Grants | None:
        """The rights of `holder` now."""
        try:
            grants = self._lookup(*holder)
        except Exception:
            logger.exception(
                "the registry cannot say what %r may do; it may do nothing", holder.name[:80]
            )
            grants = None
        if len(self._known) >= MAX_CACHED:
            self._known.clear()
        self._known[holder] = self._clock(), grants
        return grants

    def may(self, holder: CertificateHolder, action: Action, topic: str) -> bool:
        """Whether `holder` may publish to a topic, or subscribe to a filter."""
        grants = self.of(holder)
        return grants is not None and grants.may(action, topic)
