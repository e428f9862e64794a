"""A server on a thread and an event loop of its own."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Final, Self

from fleet.errors import ConfigError
from fleet.utils.file_limit import raise_file_limit
from fleet.utils.host_address import address_family, host_port, listen_remedy

START_S: Final = 10.0
STOP_S: Final = 5.0
BACKLOG: Final = 1024
"""Connections that wait to be accepted: a whole fleet may reconnect at once."""

CYCLE_S: Final = 1.0

log = logging.getLogger(__name__)


class ThreadedServer(ABC):
    """A context manager that listens on `port`; for 0 it chooses a free one, which `port` then is.

    `name` stands in its error messages and is the name of its thread. `on_cycle` is called about
    once a second by the event loop that serves.
    """

    def __init__(
        self, name: str, host: str, port: int, advice: str = "choose another port"
    ) -> None:
        """Store the values. `advice` is the next step for a port that cannot be used."""
        self.host = host
        self.port = port
        self._name = name
        self._advice = advice
        self._started: Future[asyncio.AbstractEventLoop] = Future()
        self._stop = asyncio.Event()
        self.on_cycle: Callable[[], None] = lambda: None

    def __enter__(self) -> Self:
        """Listen and start the thread.

        Raises:
            ConfigError: it cannot listen there.
        """
        raise_file_limit()
        listener = self._listen()
        self.port = listener.getsockname()[1]
        self._thread = threading.Thread(
            target=self._run, args=(listener,), name=self._name, daemon=True
        )
        self._thread.start()
        self._loop = self._started.result(START_S)
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(STOP_S)

    @property
    def is_serving(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    @abstractmethod
    async def _serve_on(self, listener: socket.socket) -> None:
        """Start to serve, await `_until_stopped`, and end within `STOP_S` seconds."""

    async def _until_stopped(self) -> None:
        """Report that the server is up, and wait until it is stopped."""
        self._started.set_result(asyncio.get_running_loop())
        while not self._stop.is_set():
            self.on_cycle()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), CYCLE_S)

    def _run(self, listener: socket.socket) -> None:
        try:
            with listener:
                asyncio.run(self._serve_on(listener))
        except Exception as error:
            if self._started.done():
                log.exception("the %s on port %d stopped", self._name, self.port)
            else:
                self._started.set_exception(error)

    def _listen(self) -> socket.socket:
        try:
            return socket.create_server(
                (self.host, self.port),
                family=address_family(self.host, self.port),
                backlog=BACKLOG,
                dualstack_ipv6=self.host == "::" and socket.has_dualstack_ipv6(),
            )
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"the {self._name} cannot listen on {host_port(self.host, self.port)}: "
                f"{listen_remedy(error, self._advice)}"
            ) from None
