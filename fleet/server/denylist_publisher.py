"""Tells workers which devices they refuse: on every change, and whenever the broker may have forgotten it."""

from __future__ import annotations

from fleet.protocol import topics
from fleet.protocol.denylist import encode_denylist
from fleet.registry.store import Registry
from fleet.transport.base import Transport


class DenylistPublisher:
    """What the registry denies, retained at the broker; `publish` is a task of the `ChangeWatcher`, also when the link
    comes up."""

    def __init__(self, transport: Transport, registry: Registry) -> None:
        self._transport = transport
        self._registry = registry
        self._payload: bytes | None = None
        transport.on_up(self._forget)

    def publish(self) -> None:
        """Publishes the names, where they are others than before.

        Raises:
            RegistryError: the registry cannot answer.
            LinkError: too many messages wait for the broker already.
        """
        payload = encode_denylist(self._registry.denied())
        if payload != self._payload:
            self._transport.publish(topics.REVOKED, payload, qos=1, retain=True)
            self._payload = payload

    def _forget(self) -> None:
        """A broker that was started again has no messages."""
        self._payload = None
