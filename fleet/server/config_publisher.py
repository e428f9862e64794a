"""Publication of each device's desired configuration."""

from __future__ import annotations

from fleet.protocol import topics
from fleet.protocol.desired_config import encode_desired
from fleet.registry.store import Registry
from fleet.transport.base import Transport


class ConfigPublisher:
    """A task of the `ChangeWatcher` that keeps the retained messages equal to the registry.

    Call `reset` on each new connection, since a restarted broker has no messages.
    """

    def __init__(self, transport: Transport, registry: Registry) -> None:
        self._transport = transport
        self._registry = registry
        self._published: dict[str, bytes] = {}

    def reset(self) -> None:
        """Have the next `publish` send every configuration again."""
        self._published = {}

    def publish(self) -> None:
        """Publish the changed configurations with QoS 1, which a broken link only delays.

        Raises:
            LinkError: the queue of the link is full.
            RegistryError: the registry is not available.
        """
        published = self._published
        configs = self._registry.desired_state.configs()
        for device in published.keys() - configs.keys():  # deleted
            self._transport.publish(topics.device_config(device), b"", qos=1, retain=True)
            del published[device]
        for device, desired in configs.items():
            payload = encode_desired(desired)
            if published.get(device) != payload:
                self._transport.publish(topics.device_config(device), payload, qos=1, retain=True)
                published[device] = payload
