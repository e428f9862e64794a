"""The rights of certificate holders, read from the registry and never on the event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from fleet.protocol.access import Action, Grants

RECHECK_S: Final = 10.0
"""Period of a look-up without a change: certificates expire."""

HOLD_S: Final = 300.0
"""The time for which the last known rights hold while the registry is away."""

LOOKUP_S: Final = 3.0
"""Time limit of one look-up."""

MAX_CACHED: Final = 10_000

T = TypeVar("T")
logger = logging.getLogger(__name__)


class CertificateHolder(NamedTuple):
    """The holder of a certificate: its CN, and the SHA-256 of its DER in hex."""

    name: str
    fingerprint: str


class ChangeCounter(Protocol):
    """The audit log of a registry."""

    def newest_change(self) -> int: ...


class HolderLookup(Protocol):
    """The identities of a registry."""

    def admitted_holders(self, holders: Sequence[tuple[str, str]]) -> Sequence[Grants | None]:
        """Return the rights of each name and fingerprint, from one look-up for all.

        None for a name that is not active, or a certificate that is not valid.
        """
        ...


class AdmissionRegistry(Protocol):
    """The registry, as far as a broker reads it."""

    @property
    def audit_log(self) -> ChangeCounter: ...

    @property
    def identities(self) -> HolderLookup: ...


class RightsCache:
    """The rights of each connected holder, so that a message costs no database query.

    `read` reads those of one holder at its CONNECT, `refresh` those of all after a change. While
    the registry is away, the last known rights hold for `HOLD_S` seconds. The look-ups run one at a
    time on a thread; one serves all holders who wait for it.
    """

    def __init__(
        self, registry: AdmissionRegistry, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._registry = registry
        self._clock = clock
        self._grants: dict[CertificateHolder, Grants] = {}
        self._requested: set[CertificateHolder] = set()
        self._lock = asyncio.Lock()
        self._call: asyncio.Future[Any] | None = None
        self._seen_change = -1
        self._checked_at = float("-inf")
        self._confirmed_at = clock()
        self.is_registry_away = False

    def get(self, holder: CertificateHolder) -> Grants | None:
        """Return the last known rights of `holder`; None without any, or if they are too old."""
        if self._clock() - self._confirmed_at > HOLD_S:
            return None
        return self._grants.get(holder)

    def reason_without_rights(self) -> str:
        """Return the reason why `get` returns None for a connected holder."""
        if self.is_registry_away:
            return f"has unknown rights: the registry has been away for {HOLD_S:g} s"
        return "is no longer enrolled, or its certificate was revoked"

    def permits(self, holder: CertificateHolder, action: Action, topic: str) -> bool:
        """Whether `holder` may publish to a topic, or subscribe to a filter."""
        grants = self.get(holder)
        return grants is not None and grants.permits(action, topic)

    async def read(self, holder: CertificateHolder) -> Grants | None:
        """Return the rights of `holder` as they are now, or the last known ones."""
        self._requested.add(holder)
        async with self._lock:
            if holder in self._requested:
                await self._read_requested()
        return self.get(holder)

    async def _read_requested(self) -> None:
        batch = list(self._requested)
        self._requested.clear()
        try:
            await self._look_up(batch)
        except Exception as error:  # noqa: BLE001  of any registry
            self._note_failure(error)
        except asyncio.CancelledError:
            self._requested.update(batch)  # the others of the batch still wait
            raise

    async def refresh(self, connected: Collection[CertificateHolder]) -> None:
        """Read the rights of all holders again if the registry has changed, or it is time to."""
        async with self._lock:
            try:
                await self._refresh(connected)
            except Exception as error:  # noqa: BLE001  of any registry
                self._note_failure(error)

    async def _refresh(self, connected: Collection[CertificateHolder]) -> None:
        newest = await self._on_thread(self._registry.audit_log.newest_change)
        now = self._clock()
        if len(self._grants) > MAX_CACHED:
            self._grants = {each: self._grants[each] for each in connected if each in self._grants}
        if newest != self._seen_change or now - self._checked_at >= RECHECK_S:
            await self._look_up(list(self._grants))
            self._seen_change = newest
            self._checked_at = now
        self._confirmed_at = now
        if self.is_registry_away:
            self.is_registry_away = False
            logger.warning("the registry is back; rights follow it again")

    async def _look_up(self, holders: Sequence[CertificateHolder]) -> None:
        lookup = self._registry.identities.admitted_holders
        rights = await self._on_thread(lambda: lookup(holders))
        for holder, grants in zip(holders, rights, strict=True):
            if grants is None:
                self._grants.pop(holder, None)
            else:
                self._grants[holder] = grants

    async def _on_thread(self, function: Callable[[], T]) -> T:
        """Call `function` on a thread, unless the former call still hangs.

        Raises:
            TimeoutError: the registry has not responded within `LOOKUP_S` seconds.
        """
        if self._call and not self._call.done():
            await asyncio.wait({self._call}, timeout=LOOKUP_S)
            if not self._call.done():
                raise TimeoutError(f"no response within {LOOKUP_S:g} s")
        call = asyncio.ensure_future(asyncio.to_thread(function))
        call.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._call = call
        async with asyncio.timeout(LOOKUP_S):  # `wait_for` may swallow a cancellation
            return await asyncio.shield(call)

    def _note_failure(self, error: Exception) -> None:
        if self.is_registry_away:
            return
        self.is_registry_away = True
        logger.warning(
            "cannot read rights from the registry (%s: %s); known clients keep theirs for at most "
            "%g s, and new ones are refused",
            *(type(error).__name__, error, HOLD_S),
        )
