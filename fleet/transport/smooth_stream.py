"""A steady pace for the replies of an answer, whose tokens may arrive in bursts."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, closing
from typing import Final

from fleet.protocol.prompt import Reply

MAX_LAG_S: Final = 0.2
"""The longest delay of a reply, and so of the end of an answer."""

NUM_INTERVALS: Final = 32
CATCH_UP: Final = 0.9
"""The pace is a little faster than the replies arrive, so that none of them stay behind."""

LAG_SHARE: Final = 0.25
WAITED_S: Final = 0.005
"""A wait for a reply of at least this length shows that no earlier reply was left to show."""

Clock = Callable[[], float]


class StreamPace:
    """The delay of each reply of one answer, a function of the times at which replies are read.

    The interval between two replies is the mean of the last `NUM_INTERVALS`. A reply that was
    awaited had no reply before it left to show. From then on the delays add up to less than
    `MAX_LAG_S`, because each takes at most `LAG_SHARE` of what is left.
    """

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=NUM_INTERVALS + 1)
        self._lag_s = 0.0

    def delay_s(self, asked_at: float, arrived_at: float) -> float:
        """Return the delay of a reply that was read from `asked_at` until `arrived_at`."""
        interval_s = self._interval_s()
        last = self._times[-1] if self._times else arrived_at
        if arrived_at - asked_at >= WAITED_S:
            self._lag_s = 0.0
        left_s = LAG_SHARE * (MAX_LAG_S - self._lag_s)
        delay_s = min(max(0.0, last + interval_s - arrived_at), left_s)
        self._lag_s += delay_s
        self._times.append(arrived_at + delay_s)
        return delay_s

    def _interval_s(self) -> float:
        count = len(self._times) - 1
        return CATCH_UP * (self._times[-1] - self._times[0]) / count if count > 0 else 0.0


def paced(
    replies: Generator[Reply, None, None],
    clock: Clock = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> Generator[Reply, None, None]:
    """Yield the replies of an answer at a steady pace, and its last one at once.

    Closing the generator, or an exception in a delay, closes `replies`.
    """
    pace = StreamPace()
    with closing(replies):
        asked_at = clock()
        for reply in replies:
            delay_s = 0.0 if reply.done else pace.delay_s(asked_at, clock())
            if delay_s:
                sleep(delay_s)
            yield reply
            asked_at = clock()


async def async_paced(replies: AsyncGenerator[Reply, None]) -> AsyncGenerator[Reply, None]:
    """Yield the replies as `paced` does, on an event loop."""
    pace = StreamPace()
    async with aclosing(replies):
        asked_at = time.monotonic()
        async for reply in replies:
            delay_s = 0.0 if reply.done else pace.delay_s(asked_at, time.monotonic())
            if delay_s:
                await asyncio.sleep(delay_s)
            yield reply
            asked_at = time.monotonic()
