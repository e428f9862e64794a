"""The keys of the HTTP API and the rights of their apps, in memory as the registry has them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from fleet.errors import AccessError, CredentialsError
from fleet.http_api.backend import ApiCaller
from fleet.protocol.api_key import ApiKey
from fleet.registry.results import ApiRights, StoredKey
from fleet.registry.store import Registry
from fleet.server.gateway.device_router import devices_named, names_of


class KeyAccess:
    """The decisions about keys and devices. Any thread may call; only `follow` uses the registry.

    The rights are those of the last `follow`, so that requests need no database.
    """

    def __init__(self, registry: Registry, clock: Callable[[], float] = time.time) -> None:
        self._registry = registry
        self._clock = clock
        self._lock = threading.Lock()
        self._rights = ApiRights(change=-1)

    def follow(self) -> None:
        """Read the rights again if the registry has changed. Raises RegistryError."""
        with self._lock:
            if self._registry.audit_log.newest_change() != self._rights.change:
                self._rights = self._registry.api_keys.rights()

    def caller(self, key: ApiKey) -> ApiCaller | None:
        """Return the app of a key; None for a key that is unknown, revoked or expired."""
        stored = self._valid_key(key.id)
        if stored is None or not key.has_hash(stored.secret_hash):
            return None
        return ApiCaller(app=stored.app, key=key.id)

    def _valid_key(self, key_id: str) -> StoredKey | None:
        stored = self._rights.keys.get(key_id)
        if stored and stored.expires_at is not None and stored.expires_at <= self._clock():
            return None
        return stored

    def names(self, caller: ApiCaller) -> list[str]:
        """Return the names that stand for devices which a caller may prompt."""
        rights = self._rights
        return names_of(rights.devices_of.get(caller.app, ()), rights.devices)

    def devices(self, caller: ApiCaller, model: str) -> Sequence[str]:
        """Return the devices that a name stands for. Raises UnknownModelError for none."""
        rights = self._rights
        return devices_named(model, rights.devices_of.get(caller.app, ()), rights.devices)

    def check(self, caller: ApiCaller, device: str) -> None:
        """Check that a caller may still use a device.

        Raises:
            CredentialsError: the key was revoked or has expired.
            AccessError: the app may not prompt the device any more.
        """
        if self._valid_key(caller.key) is None:
            raise CredentialsError("the key was revoked or has expired; use another one")
        if device not in self._rights.devices_of.get(caller.app, ()):
            raise AccessError(f"{caller.app} may not prompt {device} any more; choose another")
