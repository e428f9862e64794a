"""Synchronisation of a running mosquitto's rights and revocation list with the registry."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, Protocol

from cloud_broker_worker.broker.mosquitto import ACL_FILE, acl_text
from fleet.errors import ConfigError
from fleet.protocol.access import Grants

RECHECK_S: Final = 60.0
"""Period of a check without a change: certificates expire and lists grow old."""

SECOND_EVICTION_S: Final = 120.0
"""Delay of the second eviction: a client whose certificate was accepted before its revocation may
hold back its CONNECT; mosquitto ends such a connection after 95 seconds."""

RECENT_S: Final = 86_400.0
"""Maximum age of revocations that are evicted at the start, in case a process died before."""

MAX_EVICTIONS: Final = 20
"""Limit of one round, which takes about a second; other tasks wait for it."""


class RevocationEntry(Protocol):
    """A revoked certificate of `name`; `serial` in hex, `revoked_at` in seconds since 1970."""

    @property
    def serial(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def revoked_at(self) -> float | None: ...


class ChangeLog(Protocol):
    """The audit log of a `RightsSource`."""

    def newest_change(self) -> int: ...


class GrantSource(Protocol):
    """The identities of a `RightsSource`."""

    def all_grants(self) -> list[Grants]: ...

    def revoked_certificates(self, now: float) -> Iterable[RevocationEntry]: ...


class RightsSource(Protocol):
    """The source of rights and revocations: the registry."""

    @property
    def audit_log(self) -> ChangeLog: ...

    @property
    def identities(self) -> GrantSource: ...


class RevocationFile(Protocol):
    """The file of the revocation list; `provisioning.crl.CrlFile`."""

    def update(self, revoked: Iterable[RevocationEntry], now: float) -> frozenset[str] | None: ...


class SessionEvictor(Protocol):
    """The means to end a name's session; `provisioning.session_takeover.SessionTakeover`."""

    def evict(self, name: str) -> None: ...

    def spent(self, now: float) -> Iterable[RevocationEntry]: ...


class MosquittoSync:
    """Writes `acl` and the revocation list into `folder` when they differ, and reloads the broker.

    Without an `evictor` open connections stay open: for a broker that does not run.
    """

    def __init__(
        self,
        folder: Path,
        source: RightsSource,
        crl: RevocationFile,
        reload: Callable[[], None],
        evictor: SessionEvictor | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._acl = folder / ACL_FILE
        self._source = source
        self._crl = crl
        self._reload = reload
        self._evictor = evictor
        self._clock = clock
        self._seen_change = -1
        self._checked_at = float("-inf")
        self._must_reload = True  # the broker may not have read the present files yet
        self._is_first = True
        self._due: list[tuple[float, str]] = []  # time and name of each pending eviction

    def sync(self) -> None:
        """Write the files and evict the revoked, as far as either is due.

        A periodic task of the `ChangeWatcher`. A name's session is ended after the broker has read
        the new list, and again after `SECOND_EVICTION_S`.

        Raises:
            RegistryError: the registry cannot be read.
            FleetError: a file cannot be written, or the broker cannot be reloaded or reached.
        """
        now = self._clock()
        newest = self._source.audit_log.newest_change()
        if newest != self._seen_change or now - self._checked_at >= RECHECK_S or self._must_reload:
            self._write(now)
            self._seen_change = newest
            self._checked_at = now
        if self._evict(now):
            self._write(now)

    def _write(self, now: float) -> None:
        revoked = list(self._source.identities.revoked_certificates(now))
        spent = self._evictor.spent(now) if self._evictor else ()
        added = self._crl.update([*revoked, *spent], now)
        self._schedule_evictions(revoked, added or frozenset(), now)
        self._must_reload |= added is not None
        self._must_reload |= self._write_acl()
        if self._must_reload:  # repeated until it succeeds
            self._reload()
            self._must_reload = False

    def _schedule_evictions(
        self, revoked: list[RevocationEntry], added: frozenset[str], now: float
    ) -> None:
        """Schedule two evictions for each name in `added`, and at the start for recent ones."""
        since = now - RECENT_S if self._is_first else float("inf")
        self._is_first = False
        names = dict.fromkeys(
            each.name
            for each in revoked
            if f"{int(each.serial, 16):x}" in added
            or (each.revoked_at is not None and each.revoked_at > since)
        )
        for name in names:
            self._due += [(now, name), (now + SECOND_EVICTION_S, name)]

    def _write_acl(self) -> bool:
        """Write the rights if they have changed; whether they had."""
        text = acl_text(self._source.identities.all_grants()).encode()
        try:
            if self._acl.exists() and self._acl.read_bytes() == text:
                return False
            temporary = self._acl.with_name(f".{self._acl.name}.new")
            temporary.touch(mode=0o600)
            temporary.write_bytes(text)
            temporary.replace(self._acl)
        except OSError as error:
            raise ConfigError(
                f"cannot write {self._acl}: {error.strerror}; choose another folder"
            ) from None
        return True

    def _evict(self, now: float) -> bool:
        """End the sessions that are due; whether there were any."""
        if self._evictor is None:
            return False
        due = [item for item in self._due if item[0] <= now]
        for item in due[:MAX_EVICTIONS]:
            _, name = item
            self._evictor.evict(name)
            self._due.remove(item)
        return bool(due)
