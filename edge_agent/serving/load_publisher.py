"""The load of a device, published for the programs that choose among devices."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

from fleet.errors import LinkError
from fleet.protocol import topics
from fleet.protocol.report import DeviceLoad, encode_load
from fleet.transport.base import Transport


class LoadPublisher:
    """A publisher of the number of requests, of which `max_running` are answered at a time.

    The number that was counted last is published last.
    """

    def __init__(
        self, transport: Transport, max_running: int, count_requests: Callable[[], int]
    ) -> None:
        self._transport = transport
        self._max_running = max_running
        self._count_requests = count_requests
        self._lock = threading.Lock()

    def publish(self) -> None:
        """Publish the load now, if the link is up; call it again when the link comes up."""
        with self._lock, suppress(LinkError):
            num_requests = self._count_requests()
            num_running = min(num_requests, self._max_running)
            load = DeviceLoad(num_running=num_running, num_waiting=num_requests - num_running)
            self._transport.publish(topics.device_load(self._transport.name), encode_load(load))
