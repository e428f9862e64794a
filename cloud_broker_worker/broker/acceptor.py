"""The listener: accepts connections, limits silent ones, and makes TLS connections of them."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Final

from fleet.utils.host_address import peer_network
from fleet.utils.rate_limited_log import RateLimitedLog

CONNECT_S: Final = 10.0
"""Time limit from the acceptance of a connection to CONNECT, with the TLS handshake."""

CLOSE_S: Final = 2.0
ACCEPT_AGAIN_S: Final = 0.5
MAX_SILENT: Final = 1_024
"""Connections without CONNECT, in all."""

MAX_SILENT_PER_ADDRESS: Final = 256
SELECT_LIMIT: Final = 1024
"""The first file descriptor that `select` cannot watch; paho in this process uses `select`."""

Opened = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

logger = logging.getLogger(__name__)


class SilentConnections:
    """The connections that have not sent CONNECT yet, the oldest first.

    A client needs milliseconds for its CONNECT. So when there are too many, the oldest one is
    closed, and not the newest: idle connections keep no client out.
    """

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[None], str] = {}  # with the network of the peer
        self._by_network: dict[str, dict[asyncio.Task[None], None]] = {}

    def add(self, task: asyncio.Task[None], address: str) -> asyncio.Task[None] | None:
        """Add a connection; return the task of the one to be closed, if there are too many."""
        network = peer_network(address)
        same_network = self._by_network.setdefault(network, {})
        self._tasks[task] = network
        same_network[task] = None
        if len(same_network) > MAX_SILENT_PER_ADDRESS:
            return next(iter(same_network))
        return next(iter(self._tasks)) if len(self._tasks) > MAX_SILENT else None

    def discard(self, task: asyncio.Task[None]) -> None:
        """Remove a connection that has sent CONNECT, or has ended."""
        network = self._tasks.pop(task, None)
        if network is None:
            return
        same_network = self._by_network[network]
        del same_network[task]
        if not same_network:
            del self._by_network[network]


class Acceptor:
    """Calls `opened` in a task for each TLS connection on `listener`.

    `opened` has `CONNECT_S` seconds, with the handshake, until it calls `end_silence`.
    """

    def __init__(self, listener: socket.socket, tls: ssl.SSLContext, opened: Opened) -> None:
        self._listener = listener
        self._tls = tls
        self._opened = opened
        self._silent = SilentConnections()
        self._log = RateLimitedLog(logger)
        self._deadlines: dict[asyncio.Task[None], asyncio.Timeout] = {}

    async def run(self) -> None:
        """Accept connections until it is cancelled."""
        self._listener.setblocking(False)
        while True:
            try:
                sock, peer = await asyncio.get_running_loop().sock_accept(self._listener)
            except OSError as error:  # no file descriptors are left, or the peer has gone again
                self._log.warning("cannot accept a connection: %s", error)
                await asyncio.sleep(ACCEPT_AGAIN_S)
                continue
            self._start(above_select(sock), peer[0])

    def end_silence(self) -> None:
        """Note that the client of the current task has sent its first packet."""
        task = asyncio.current_task()
        if task in self._deadlines:
            self._deadlines[task].reschedule(None)
            self._silent.discard(task)

    async def close(self) -> None:
        """End every connection."""
        await asyncio.sleep(0)  # each has taken its first step, after which it closes its socket
        tasks = list(self._deadlines)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, sock: socket.socket, address: str) -> None:
        task = asyncio.create_task(self._serve(sock))
        self._deadlines[task] = asyncio.timeout(CONNECT_S)
        task.add_done_callback(self._forget)
        oldest = self._silent.add(task, address)
        if oldest:
            self._log.warning("too many silent connections, the last from %s", address)
            self._silent.discard(oldest)
            # Not before its first step, after which it closes its socket.
            asyncio.get_running_loop().call_soon(oldest.cancel)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._silent.discard(task)
        del self._deadlines[task]

    async def _serve(self, sock: socket.socket) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            async with self._deadlines[task]:
                reader, writer = await self._open(sock)
                try:
                    await self._opened(reader, writer)
                except asyncio.CancelledError:
                    writer.transport.abort()
                    raise
                writer.close()
        except OSError as error:  # also TimeoutError and SSLError
            logger.debug("a connection ended before CONNECT: %s", error)

    async def _open(self, sock: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Make a TLS connection of an accepted one."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        try:
            # asyncio does this only for sockets with an explicit protocol number, which accepted
            # ones lack.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol,
                sock,
                ssl=self._tls,
                ssl_handshake_timeout=CONNECT_S,
                ssl_shutdown_timeout=CLOSE_S,
            )
        except BaseException:
            sock.close()
            raise
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


def above_select(sock: socket.socket) -> socket.socket:
    """Return the same connection with a file descriptor that leaves low ones to `select`."""
    try:
        number = fcntl.fcntl(sock, fcntl.F_DUPFD_CLOEXEC, SELECT_LIMIT)
    except OSError:  # the limit of file descriptors is not higher
        return sock
    sock.close()
    duplicate = socket.socket(fileno=number)
    duplicate.setblocking(False)
    return duplicate
