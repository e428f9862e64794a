"""A cache of the registry's rights by certificate, refreshed at most every two seconds."""

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
    """The holder of a certificate: its CN, and the SHA-256 of its DER in hex."""

    name: str
    fingerprint: str


RightsLookup = Callable[[str, str], Grants | None]
"""Rights by name and fingerprint; None without enrolment or with an invalid certificate."""


class RightsCache:
    """Rights by holder, so that a message costs no database query.

    While the registry fails, no holder has rights.
    """

    def __init__(self, lookup: RightsLookup, clock: Callable[[], float] = time.monotonic) -> None:
        self._lookup = lookup
        self._clock = clock
        self._entries: dict[CertificateHolder, tuple[float, Grants | None]] = {}

    def get(self, holder: CertificateHolder) -> Grants | None:
        """Return the rights of `holder`, at most `CACHE_S` seconds old; None without any."""
        read_at, grants = self._entries.get(holder, (float("-inf"), None))
        if self._clock() - read_at >= CACHE_S:
            grants = self.fresh(holder)
        return grants

    def fresh(self, holder: CertificateHolder) -> Grants | None:
        """Read the rights of `holder` from the registry."""
        try:
            grants = self._lookup(*holder)
        except Exception:
            text = "cannot read the rights of %r from the registry; it has none until then"
            logger.exception(text, holder.name[:80])
            grants = None
        if len(self._entries) >= MAX_CACHED:
            self._entries.clear()
        self._entries[holder] = (self._clock(), grants)
        return grants

    def permits(self, holder: CertificateHolder, action: Action, topic: str) -> bool:
        """Whether `holder` may publish to a topic, or subscribe to a filter."""
        grants = self.get(holder)
        return grants is not None and grants.permits(action, topic)
