"""A broker in memory whose messages arrive late, as over a link with a round trip."""

from __future__ import annotations

import time
from functools import partial

from fleet.transport.base import Will
from fleet.transport.in_memory import InMemoryBroker, InMemoryTransport


class DelayedBroker(InMemoryBroker):
    """A broker that delivers each message half a round trip late, in order."""

    def __init__(self, round_trip_s: float) -> None:
        super().__init__()
        self._delay_s = round_trip_s / 2

    def connect(self, name: str, will: Will | None = None) -> InMemoryTransport:
        transport = _DelayedTransport(self, name, will, self._delay_s)
        transport.start()
        return transport


class _DelayedTransport(InMemoryTransport):
    def __init__(
        self, broker: InMemoryBroker, name: str, will: Will | None, delay_s: float
    ) -> None:
        super().__init__(broker, name, will)
        self._delay_s = delay_s

    def _offer(self, topic: str, payload: bytes, *, is_retained: bool) -> None:
        self._jobs.put(partial(_wait_until, time.monotonic() + self._delay_s))
        super()._offer(topic, payload, is_retained=is_retained)


def _wait_until(due: float) -> None:
    time.sleep(max(0.0, due - time.monotonic()))
