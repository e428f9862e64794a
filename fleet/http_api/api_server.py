"""The server of an HTTP API, on a thread and an event loop of its own."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Final

from aiohttp import web

from fleet.http_api.api_address import ApiAddress
from fleet.http_api.application import api_refusal, http_application
from fleet.http_api.backend import ApiBackend
from fleet.transport.http_listener import HttpConnection, HttpListener
from fleet.transport.threaded_server import STOP_S, ThreadedServer
from fleet.utils.host_address import host_port

IDLE_S: Final = 60.0
LINGER_S: Final = 2.0
"""Seconds for which the rest of a refused body is read and dropped, so that its client can read the
response."""


class ApiServer(ThreadedServer):
    """The server, as a context manager.

    Where only this machine can connect, requests must name it as their host: a web page that makes
    its own name an address of this machine is refused. With `needs_key` each host is accepted,
    because such a page has no key, and a reverse proxy may forward the host of its own.
    """

    def __init__(
        self,
        address: ApiAddress,
        backend: ApiBackend,
        tls: ssl.SSLContext | None = None,
        *,
        needs_key: bool = False,
    ) -> None:
        super().__init__("API", address.host, address.port, "choose another with --api")
        self._hosts = None if needs_key else address.request_hosts
        self._backend = backend
        self._tls = tls

    @property
    def url(self) -> str:
        """The base URL."""
        scheme = "https" if self._tls else "http"
        return f"{scheme}://{host_port(self.host, self.port)}"

    async def _serve_on(self, listener: socket.socket) -> None:
        runner = web.AppRunner(
            http_application(self._backend, self._hosts),
            handler_cancellation=True,
            shutdown_timeout=STOP_S / 2,
        )
        await runner.setup()
        connections = HttpListener(
            listener,
            runner,
            _Connection,
            self._tls,
            access_log=None,
            keepalive_timeout=IDLE_S,
            lingering_time=LINGER_S,
        )
        accepting = asyncio.create_task(connections.run())
        await self._until_stopped()
        accepting.cancel()
        await runner.cleanup()


class _Connection(HttpConnection):
    """A client's connection; a request that aiohttp refuses has an error of an API, too."""

    def refusal(self, status: int) -> web.Response:
        return api_refusal(status)
