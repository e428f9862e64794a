"""What operators want of devices, published where each device reads it."""

from __future__ import annotations

from fleet.protocol import topics
from fleet.protocol.desired_config import encode_desired
from fleet.registry.store import Registry
from fleet.transport.base import Transport


class ConfigPublisher:
    """Keeps each device's retained message equal to the registry: a task of the `ChangeWatcher`.

    Whoever sees the link come up calls `forget`, since a broker that was started again knows nothing.
    """

    def __init__(self, transport: Transport, registry: Registry) -> None:
        self._transport = transport
        self._registry = registry
        self._published: dict[str, bytes] = {}

    def forget(self) -> None:
        """Has everything published again by the next `publish`."""
        self._published = {}

    def publish(self) -> None:
        """Publishes what has changed; QoS 1, so that a link that is down delays it and loses nothing.

        Raises:
            LinkError: too much waits for the link already.
            RegistryError: the registry cannot answer.
        """
        published = self._published
        for device, desired in self._registry.desired_configs().items():
            payload = encode_desired(desired)
            if published.get(device) != payload:
                self._transport.publish(topics.device_config(device), payload, qos=1, retain=True)
                published[device] = payload
