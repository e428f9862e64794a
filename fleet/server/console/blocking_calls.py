"""Blocking calls for an event loop: on threads, bounded in number and in time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from fleet.errors import BusyError, DeadlineError

NUM_THREADS: Final = 8
MAX_CALLS: Final = 64
CALL_S: Final = 60.0

T = TypeVar("T")


class BlockingCalls:
    """Threads for blocking calls. At most `MAX_CALLS` run or wait at a time."""

    def __init__(self, timeout_s: float = CALL_S) -> None:
        self._timeout_s = timeout_s
        self._free = threading.Semaphore(MAX_CALLS)
        self._threads = ThreadPoolExecutor(NUM_THREADS, "operator-api")

    async def run(self, call: Callable[[], T]) -> T:
        """Return what `call` returns, or raise what it raises.

        Raises:
            BusyError: too many calls run or wait.
            DeadlineError: it takes too long. It goes on, because a thread cannot be stopped.
        """
        if not self._free.acquire(blocking=False):
            raise BusyError("the server runs too many requests now; send this one again")
        future = self._threads.submit(call)
        future.add_done_callback(lambda _: self._free.release())
        deadline = asyncio.timeout(self._timeout_s)
        try:
            async with deadline:
                return await asyncio.wrap_future(future)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise DeadlineError(
                f"the server needs more than {self._timeout_s:g} s for this; a change may still "
                "take place: look before you repeat it"
            ) from None

    def close(self) -> None:
        """Drop the calls that wait; those that run end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)
