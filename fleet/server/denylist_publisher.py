"""Publication of the denied devices, which workers refuse."""

from __future__ import annotations

from fleet.protocol import topics
from fleet.protocol.denylist import encode_denylist
from fleet.registry.store import Registry
from fleet.transport.base import Transport


class DenylistPublisher:
    """The registry's denied names, retained at the broker.

    `publish` is a task of the `ChangeWatcher`, which also runs it on each new connection.
    """

    def __init__(self, transport: Transport, registry: Registry) -> None:
        self._transport = transport
        self._registry = registry
        self._payload: bytes | None = None
        transport.on_up(self._reset)

    def publish(self) -> None:
        """Publish the names if they have changed.

        Raises:
            RegistryError: the registry is not available.
            LinkError: the queue of the link is full.
        """
        payload = encode_denylist(self._registry.identities.denied())
        if payload != self._payload:
            self._transport.publish(topics.REVOKED, payload, qos=1, retain=True)
            self._payload = payload

    def _reset(self) -> None:
        """Forget what was published: a restarted broker has no messages."""
        self._payload = None
