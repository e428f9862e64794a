"""Removal of the retained messages of deleted identities."""

from __future__ import annotations

from fleet.protocol import topics
from fleet.protocol.access import Role
from fleet.registry.store import Registry
from fleet.transport.base import Transport


class RetainedCleaner:
    """A task of the `ChangeWatcher` that clears what a broker retains of deleted identities.

    These are statuses and desired configurations. Call `reset` on each new connection, since
    another server may have been connected meanwhile.
    """

    def __init__(self, transport: Transport, registry: Registry) -> None:
        self._transport = transport
        self._registry = registry
        self._cleared: set[str] = set()

    def reset(self) -> None:
        """Have the next `clear` clear the messages of every deleted identity again."""
        self._cleared = set()

    def clear(self) -> None:
        """Publish an empty retained message on each topic of the newly deleted identities.

        Raises:
            LinkError: the queue of the link is full.
            RegistryError: the registry is not available.
        """
        cleared = self._cleared
        deleted = self._registry.identities.deleted()
        cleared &= deleted.keys()  # a name may have been enrolled again
        for name in deleted.keys() - cleared:
            for topic in _retained_topics(name, deleted[name]):
                self._transport.publish(topic, b"", qos=1, retain=True)
            cleared.add(name)


def _retained_topics(name: str, role: Role) -> tuple[str, ...]:
    if role is Role.DEVICE:
        return topics.device_status(name), topics.device_config(name)
    return (topics.worker_status(name),) if role is Role.WORKER else ()
