"""A mosquitto's rights and revocation list, kept equal to the registry while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, Protocol

from cloud_broker_worker.broker.mosquitto import ACL_FILE, acl_text
from fleet.errors import ConfigError
from fleet.protocol.access import Grants

RECHECK_S: Final = 60.0
"""Without a change certificates end and lists grow old; so often somebody looks."""
HELD_S: Final = 120.0
"""Who showed a certificate before it was revoked may wait with its CONNECT; mosquitto ends that after 95 seconds."""

RECENT_S: Final = 86_400.0
"""Who was revoked so shortly before we began may still have a session: whoever kept the files then may have died."""

MAX_EVICTIONS: Final = 20
"""In one round, about a second's worth: other tasks wait for it."""


class Revoked(Protocol):
    """A certificate that may not be used, of `name`; `serial` in hex."""

    @property
    def serial(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def revoked_at(self) -> float | None: ...


class RightsSource(Protocol):
    """What is to be kept: the registry."""

    def newest_change(self) -> int: ...

    def all_grants(self) -> list[Grants]: ...

    def revoked_certificates(self, now: float) -> Iterable[Revoked]: ...


class RevocationList(Protocol):
    """The file that says which certificates count no more; `provisioning.crl.CrlFile`."""

    def update(self, revoked: Iterable[Revoked], now: float) -> frozenset[str] | None: ...


class Evicting(Protocol):
    """What ends a name's session; `provisioning.session_takeover.Evictions`."""

    def evict(self, name: str) -> None: ...

    def spent(self, now: float) -> Iterable[Revoked]: ...


class MosquittoSync:
    """Writes `acl` and the revocation list into `folder` when they differ, and has `reload` tell the broker.

    Without `evictions` connections that are open stay so: for a broker that does not run.
    """

    def __init__(
        self,
        folder: Path,
        source: RightsSource,
        crl: RevocationList,
        reload: Callable[[], None],
        evictions: Evicting | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._acl = folder / ACL_FILE
        self._source = source
        self._crl = crl
        self._reload = reload
        self._evictions = evictions
        self._clock = clock
        self._seen = -1
        self._checked_at = float("-inf")
        self._must_reload = (
            True  # what the files say the broker may not have been told before we began
        )
        self._is_first = True
        self._due: list[tuple[float, str]] = []  # when whose session is to be ended

    def sync(self) -> None:
        """Does what is due; a periodic task of the `ChangeWatcher`.

        A name's session is ended after the broker has the new list, and once more when nobody can be left who was let
        in by the old one and had said nothing yet.

        Raises:
            RegistryError: the registry cannot answer.
            FleetError: a file cannot be written, or the broker not be told or reached.
        """
        now = self._clock()
        newest = self._source.newest_change()
        if newest != self._seen or now - self._checked_at >= RECHECK_S or self._must_reload:
            self._write(now)
            self._seen = newest
            self._checked_at = now
        if self._evict(now):
            self._write(now)

    def _write(self, now: float) -> None:
        revoked = list(self._source.revoked_certificates(now))
        spent = self._evictions.spent(now) if self._evictions else ()
        listed = self._crl.update([*revoked, *spent], now)
        is_first = self._is_first
        self._is_first = False
        names = dict.fromkeys(
            each.name
            for each in revoked
            if (listed and _canonical(each.serial) in listed)
            or (is_first and each.revoked_at is not None and each.revoked_at > now - RECENT_S)
        )
        self._due += [(at, name) for name in names for at in (now, now + HELD_S)]
        self._must_reload |= listed is not None
        self._must_reload |= self._write_acl()
        if self._must_reload:  # until it has succeeded
            self._reload()
            self._must_reload = False

    def _write_acl(self) -> bool:
        text = acl_text(self._source.all_grants()).encode()
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
        """Ends the sessions that are due; whether there were any."""
        due = [item for item in self._due if item[0] <= now] if self._evictions else []
        for item in due[:MAX_EVICTIONS]:
            assert self._evictions is not None
            self._evictions.evict(item[1])
            self._due.remove(item)
        return bool(due)


def _canonical(serial: str) -> str:
    return f"{int(serial, 16):x}"
