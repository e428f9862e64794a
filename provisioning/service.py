"""The HTTPS service, on its own thread and event loop: devices join, renew and fetch bundles."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Final

from aiohttp import web

from fleet.errors import DecodeError, FleetError
from fleet.identity.identity import ServerTls
from fleet.transport.http_listener import HttpConnection, HttpListener
from fleet.transport.threaded_server import STOP_S
from fleet.transport.tls_server import TlsServer
from provisioning.enrolment_service import EnrolmentService
from provisioning.fleet_address import base_url
from provisioning.http_errors import error_response, http_error_response
from provisioning.rate_limit import RateLimit
from provisioning.routes import Routes

IDLE_S: Final = 15.0
"""Time limit of a silent connection between requests, of a request's headers, and of its body."""

JOINS_PER_MINUTE: Final = 10
JOINS_AT_ONCE: Final = 20
NO_REQUEST: Final = "expected a request of HTTP/1.1, got bytes that are none, or too large a header"


class _Connection(HttpConnection):
    """A client's connection; a request that aiohttp refuses has a `ServiceProblem`, too."""

    def refusal(self, status: int) -> web.Response:
        return error_response(DecodeError(NO_REQUEST) if status < 500 else FleetError("internal"))

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send a response. That of aiohttp's own refusals becomes one of the service."""
        if isinstance(resp, web.HTTPException):
            resp = http_error_response(resp)
        return await super().finish_response(request, resp, start_time)


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
        runner = web.AppRunner(self._routes.application(), shutdown_timeout=STOP_S / 2)
        await runner.setup()
        connections = HttpListener(
            listener,
            runner,
            _Connection,
            context,
            access_log=None,
            keepalive_timeout=self._idle_s,
        )
        accepting = asyncio.create_task(connections.run())
        await self._until_stopped()
        accepting.cancel()
        await runner.cleanup()
