"""The HTTPS service, on its own thread and event loop: devices join, renew and fetch bundles."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Final

from aiohttp import web

from fleet.identity.identity import ServerTls
from fleet.transport.tls_server import STOP_S, TlsServer
from provisioning.enrolment_service import EnrolmentService
from provisioning.fleet_address import base_url
from provisioning.rate_limit import RateLimit
from provisioning.routes import Routes

HANDSHAKE_S: Final = 10.0
IDLE_S: Final = 15.0
"""Time limit of a silent connection between requests, of a request's headers, and of its body."""

JOINS_PER_MINUTE: Final = 10
JOINS_AT_ONCE: Final = 20


class EnrolmentServer(TlsServer):
    """The server, as a context manager; for `port` 0 it chooses a free one, and sets `port` to it.

    A client without a certificate can join. A client's certificate must be one of the fleet's.
    """

    def __init__(
        self,
        host: str,
        port: int,
        tls: ServerTls,
        service: EnrolmentService,
        joins: RateLimit | None = None,
        idle_s: float = IDLE_S,
    ) -> None:
        super().__init__("service", host, port, tls, advice="choose another with --service-port")
        self._idle_s = idle_s
        self._routes = Routes(
            service,
            joins or RateLimit(JOINS_PER_MINUTE, JOINS_AT_ONCE),
            RateLimit(JOINS_PER_MINUTE, JOINS_AT_ONCE),
            body_timeout_s=idle_s,
        )

    @property
    def url(self) -> str:
        """The base URL of the service."""
        return base_url(self.host, self.port)

    def _ssl_context(self) -> ssl.SSLContext:
        context = super()._ssl_context()
        context.verify_mode = ssl.CERT_OPTIONAL
        return context

    async def _serve(self, listener: socket.socket, context: ssl.SSLContext) -> None:
        runner = web.AppRunner(
            self._routes.application(),
            access_log=None,
            keepalive_timeout=self._idle_s,
            shutdown_timeout=STOP_S / 2,
        )
        await runner.setup()
        assert runner.server
        server = await asyncio.get_running_loop().create_server(
            runner.server,
            sock=listener,
            ssl=context,
            ssl_handshake_timeout=HANDSHAKE_S,
            ssl_shutdown_timeout=STOP_S / 2,
        )
        await self._until_stopped()
        server.close()
        await runner.cleanup()
