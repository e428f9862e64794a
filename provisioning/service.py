"""The HTTPS service: devices join, renew and fetch bundles there. On a thread and an event loop of its own."""

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
"""How long a connection may be silent between requests, or take to say what it wants, or for a body."""

JOINS_PER_MINUTE: Final = 10
JOINS_AT_ONCE: Final = 20


class EnrolmentServer(TlsServer):
    """A context manager; `port` 0 takes a free one, which `port` then says.

    Who shows a certificate shows one of the fleet's own, or is not let in; who shows none can join.
    """

    def __init__(
        self,
        host: str,
        port: int,
        tls: ServerTls,
        office: EnrolmentService,
        joins: RateLimit | None = None,
        idle_s: float = IDLE_S,
    ) -> None:
        super().__init__("service", host, port, tls, other="choose another with --service-port")
        self._idle_s = idle_s
        self._routes = Routes(
            office,
            joins or RateLimit(JOINS_PER_MINUTE, JOINS_AT_ONCE),
            RateLimit(JOINS_PER_MINUTE, JOINS_AT_ONCE),
            body_s=idle_s,
        )

    @property
    def url(self) -> str:
        """Where it listens."""
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
