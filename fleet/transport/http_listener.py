"""The connections of an HTTP server: their number is limited, and each has to ask in time."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import ssl
from collections import Counter
from typing import Any, Final

from aiohttp import web

from fleet.utils.host_address import peer_network
from fleet.utils.rate_limited_log import RateLimitedLog

FIRST_REQUEST_S: Final = 10.0
"""Time limit from the acceptance of a connection to its first headers, with the TLS handshake."""

CLOSE_S: Final = 2.0
ACCEPT_AGAIN_S: Final = 0.5
MAX_CONNECTIONS: Final = 2_048
FILE_SHARE: Final = 1 / 4
"""The largest share of the process's file descriptors that a server uses."""

ADDRESS_SHARE: Final = 1 / 2
"""The largest share of the connections of one IPv4 address or one IPv6 /64.

All clients behind a reverse proxy are one address.
"""

LOG_S: Final = 10.0

log = RateLimitedLog(logging.getLogger(__name__), LOG_S)


class HttpConnection(web.RequestHandler):
    """A client's connection. Its failures are logged at a limited rate."""

    network = ""
    opening: asyncio.Task[None] | None = None
    deadline: asyncio.TimerHandle | None = None
    listener: HttpListener | None = None

    def connection_lost(self, exc: BaseException | None) -> None:
        """Tell the listener, too."""
        super().connection_lost(exc)
        if self.listener:
            self.listener.forget(self)

    def close_now(self) -> None:
        """End the connection, or its TLS handshake."""
        if self.transport:
            self.transport.abort()
        elif self.opening:
            self.opening.cancel()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Log bytes that are no request, or a failure of a handler, and return the response."""
        reason = exc or message or "no reason is known"
        log.warning("a request of %s gets the status %d: %s", request.remote, status, reason)
        response = self.refusal(status)
        response.force_close()
        return response

    def refusal(self, status: int) -> web.Response:
        """Make the response with a status; subclasses override it."""
        return web.Response(status=status, headers={"Server": "fleet"})

    def log_exception(self, *_: Any, exc_info: object = None, **__: Any) -> None:
        """Log what ended the connection, such as a body that cannot be decompressed."""
        log.warning("a connection of %s is closed: %s", self.network, exc_info)


class HttpListener:
    """Accepts connections for a server of aiohttp.

    At the limit, the connection that has been idle for the longest time is closed, so that idle
    ones keep no client out. If none is idle, the new one is closed. At the limit of one address,
    only the idle ones of this address count.
    """

    def __init__(
        self,
        listener: socket.socket,
        runner: web.AppRunner,
        kind: type[HttpConnection],
        tls: ssl.SSLContext | None = None,
        **options: Any,
    ) -> None:
        """Count the requests of the server of `runner`, after `runner.setup()`.

        `options` are those of `web.RequestHandler`.
        """
        assert runner.server
        self._listener = listener
        self._server = runner.server
        self._kind = kind
        self._tls = tls
        self._options = options
        self._idle: dict[HttpConnection, None] = {}  # ordered: the longest idle first
        self._num_of_network = Counter[str]()
        self._connections: set[HttpConnection] = set()
        self._handle = self._server.request_handler
        self._server.request_handler = self._counted

    async def run(self) -> None:
        """Accept connections until it is cancelled."""
        self._listener.setblocking(False)
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, peer = await loop.sock_accept(self._listener)
            except OSError as error:  # no file descriptors are left, or the peer has gone again
                log.warning("cannot accept a connection: %s", error)
                await asyncio.sleep(ACCEPT_AGAIN_S)
                continue
            self._start(sock, peer_network(peer[0]))

    def _start(self, sock: socket.socket, network: str) -> None:
        if not self._has_room(network):
            sock.close()
            return
        loop = asyncio.get_running_loop()
        connection = self._kind(self._server, loop=loop, **self._options)
        connection.network = network
        connection.listener = self
        self._connections.add(connection)
        self._idle[connection] = None
        self._num_of_network[network] += 1
        connection.deadline = loop.call_later(FIRST_REQUEST_S, connection.close_now)
        connection.opening = asyncio.create_task(self._open(sock, connection))

    def _has_room(self, network: str) -> bool:
        """Return whether there is room for one more connection; make it if possible."""
        limit = max_connections()
        is_address_full = self._num_of_network[network] >= max(int(limit * ADDRESS_SHARE), 1)
        if not is_address_full and len(self._connections) < limit:
            return True
        log.warning("too many connections, the last from %s", network)
        return self._close_oldest(network if is_address_full else None)

    def _close_oldest(self, network: str | None) -> bool:
        """Close a connection without a request, if there is one, of `network` or of any."""
        idle = (each for each in self._idle if network in (None, each.network))
        oldest = next(idle, None)
        if oldest is None:
            return False
        self.forget(oldest)
        # Not at once: if `_open` has not begun, a cancellation would skip its `except`.
        asyncio.get_running_loop().call_soon(oldest.close_now)
        return True

    def forget(self, connection: HttpConnection) -> None:
        """Remove a connection that ends."""
        if connection not in self._connections:
            return
        self._connections.discard(connection)
        self._idle.pop(connection, None)
        self._num_of_network -= Counter([connection.network])
        if connection.deadline:
            connection.deadline.cancel()

    async def _open(self, sock: socket.socket, connection: HttpConnection) -> None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection,
                sock,
                ssl=self._tls,
                ssl_handshake_timeout=FIRST_REQUEST_S if self._tls else None,
                ssl_shutdown_timeout=CLOSE_S if self._tls else None,
            )
        except OSError:  # also a failed handshake
            self._fail(sock, connection)
        except asyncio.CancelledError:
            self._fail(sock, connection)
            raise

    def _fail(self, sock: socket.socket, connection: HttpConnection) -> None:
        sock.close()
        self.forget(connection)

    async def _counted(self, request: web.BaseRequest) -> web.StreamResponse:
        """Handle a request; meanwhile its connection is not idle."""
        connection = request.protocol
        assert isinstance(connection, HttpConnection)
        self._idle.pop(connection, None)
        if connection.deadline:
            connection.deadline.cancel()
        try:
            return await self._handle(request)
        finally:
            if connection in self._connections:
                self._idle[connection] = None


def max_connections() -> int:
    """Return the maximum number of connections of one server."""
    num_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(min(MAX_CONNECTIONS, int(num_files * FILE_SHARE)), 1)
