"""The devices as the broker shows them: online or not, and their load."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final, Self

from fleet.errors import ProtocolError
from fleet.protocol import topics
from fleet.protocol.report import DeviceLoad, DeviceStatus, decode_load, decode_status
from fleet.server.gateway.device_router import DeviceState
from fleet.transport.base import Transport
from fleet.utils.rate_limited_log import RateLimitedLog

log = RateLimitedLog(logging.getLogger(__name__), 10.0)
IDLE: Final = DeviceLoad()


class DeviceDirectory:
    """A context manager that follows the statuses and loads of all devices.

    It calls `on_offline`, on the transport's thread, with each device that goes offline or starts
    again.
    """

    def __init__(self, transport: Transport, on_offline: Callable[[str], None]) -> None:
        self._transport = transport
        self._on_offline = on_offline
        self._epochs: dict[str, int] = {}  # of the devices that are online
        self._loads: dict[str, DeviceLoad] = {}
        self._num_asked: Counter[str] = Counter()
        self._last_used: dict[str, int] = {}
        self._num_used = 0

    def __enter__(self) -> Self:
        subscribe = self._transport.subscribe
        subscribe(topics.DEVICE_LOAD_FILTER, self._on_load)
        subscribe(topics.DEVICE_STATUS_FILTER, self._on_status, qos=1, retained=True)
        return self

    def __exit__(self, *_: object) -> None:
        for topic_filter in (topics.DEVICE_LOAD_FILTER, topics.DEVICE_STATUS_FILTER):
            self._transport.unsubscribe(topic_filter)

    def states(self, devices: Iterable[str]) -> dict[str, DeviceState]:
        """Return the states of `devices` now."""
        return {device: self._state(device) for device in devices}

    def _state(self, device: str) -> DeviceState:
        load = self._loads.get(device, IDLE)
        return DeviceState(
            online=device in self._epochs,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_asked=self._num_asked[device],
            last_used=self._last_used.get(device, 0),
        )

    @contextmanager
    def asking(self, device: str) -> Iterator[None]:
        """Count a request at a device until the block ends."""
        self._num_used += 1
        self._last_used[device] = self._num_used
        self._num_asked[device] += 1
        try:
            yield
        finally:
            self._num_asked[device] -= 1

    def _on_status(self, topic: str, payload: bytes) -> None:
        try:
            (device,) = topics.parse_topic(topic, topics.DEVICE_STATUS_FILTER)
            status = decode_status(payload, DeviceStatus)
        except ProtocolError as error:
            log.warning("message on %r dropped: %s", topic[:200], error)
            return
        earlier = self._epochs.get(device)
        if status.online:
            self._epochs[device] = status.epoch
        else:
            self._epochs.pop(device, None)
        if earlier not in (None, self._epochs.get(device)):
            self._loads.pop(device, None)
            self._on_offline(device)

    def _on_load(self, topic: str, payload: bytes) -> None:
        try:
            (device,) = topics.parse_topic(topic, topics.DEVICE_LOAD_FILTER)
            self._loads[device] = decode_load(payload)
        except ProtocolError as error:
            log.warning("message on %r dropped: %s", topic[:200], error)
