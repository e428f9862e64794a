"""A server of an application of aiohttp, on a thread and an event loop of its own."""

from __future__ import annotations

import asyncio
import socket
import ssl
from abc import abstractmethod
from typing import Final

from aiohttp import web

from fleet.transport.http_listener import HttpConnection, HttpListener
from fleet.transport.threaded_server import STOP_S, ThreadedServer
from fleet.utils.host_address import host_port

IDLE_S: Final = 60.0
LINGER_S: Final = 2.0
"""Seconds for which the rest of a refused body is read and dropped, so that its client can read the
response."""


class HttpServer(ThreadedServer):
    """The server, as a context manager; `connection_type` responds to what is no request."""

    connection_type: type[HttpConnection] = HttpConnection

    def __init__(
        self, name: str, host: str, port: int, advice: str, tls: ssl.SSLContext | None
    ) -> None:
        super().__init__(name, host, port, advice)
        self._tls = tls

    @property
    def url(self) -> str:
        """The base URL."""
        scheme = "https" if self._tls else "http"
        return f"{scheme}://{host_port(self.host, self.port)}"

    @abstractmethod
    def _application(self) -> web.Application:
        """Return the application, on the event loop that serves it."""

    async def _serve_on(self, listener: socket.socket) -> None:
        runner = web.AppRunner(
            self._application(), handler_cancellation=True, shutdown_timeout=STOP_S / 2
        )
        await runner.setup()
        connections = HttpListener(
            listener,
            runner,
            self.connection_type,
            self._tls,
            access_log=None,
            keepalive_timeout=IDLE_S,
            lingering_time=LINGER_S,
        )
        accepting = asyncio.create_task(connections.run())
        await self._until_stopped()
        accepting.cancel()
        await runner.cleanup()
