"""The HTTPS service: devices join, renew and fetch bundles there. On a thread and an event loop of its own."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
import threading
from concurrent.futures import Future
from types import TracebackType
from typing import Final, Self

from aiohttp import web

from fleet.errors import ConfigError
from fleet.identity import ServerTls
from provisioning.office import Office
from provisioning.rate_limit import RateLimit
from provisioning.routes import Routes
from provisioning.site import base_url

START_S: Final = 10.0
STOP_S: Final = 5.0
HANDSHAKE_S: Final = 10.0
IDLE_S: Final = 15.0
"""How long a connection may be silent between requests, or take to say what it wants, or for a body."""

JOINS_PER_MINUTE: Final = 10
JOINS_AT_ONCE: Final = 20

log = logging.getLogger(__name__)


class Service:
    """A context manager; `port` 0 takes a free one, which `port` then says.

    Who shows a certificate shows one of the fleet's own, or is not let in; who shows none can join.
    """

    def __init__(
        self,
        host: str,
        port: int,
        tls: ServerTls,
        office: Office,
        joins: RateLimit | None = None,
        idle_s: float = IDLE_S,
    ) -> None:
        self.host = host
        self.port = port
        self._tls = tls
        self._idle_s = idle_s
        self._routes = Routes(
            office,
            joins or RateLimit(JOINS_PER_MINUTE, JOINS_AT_ONCE),
            RateLimit(JOINS_PER_MINUTE, JOINS_AT_ONCE),
            body_s=idle_s,
        )
        self._started: Future[asyncio.AbstractEventLoop] = Future()
        self._stop = asyncio.Event()

    def __enter__(self) -> Self:
        """Raises ConfigError when it cannot listen there, IdentityError when its certificate does not load."""
        context = self._tls.ssl_context()
        context.verify_mode = ssl.CERT_OPTIONAL
        listener = _listen(self.host, self.port)
        self.port = listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, args=(listener, context), name="service", daemon=True)
        self._thread.start()
        self._loop = self._started.result(START_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(STOP_S)

    @property
    def url(self) -> str:
        """Where it listens."""
        return base_url(self.host, self.port)

    def _run(self, listener: socket.socket, context: ssl.SSLContext) -> None:
        try:
            with listener:
                asyncio.run(self._serve(listener, context))
        except Exception as error:
            if self._started.done():
                log.exception("the service on port %d stopped", self.port)
            else:
                self._started.set_exception(error)

    async def _serve(self, listener: socket.socket, context: ssl.SSLContext) -> None:
        loop = asyncio.get_running_loop()
        runner = web.AppRunner(
            self._routes.application(), access_log=None, keepalive_timeout=self._idle_s, shutdown_timeout=STOP_S / 2
        )
        await runner.setup()
        assert runner.server
        server = await loop.create_server(
            runner.server,
            sock=listener,
            ssl=context,
            ssl_handshake_timeout=HANDSHAKE_S,
            ssl_shutdown_timeout=STOP_S / 2,
        )
        self._started.set_result(loop)
        await self._stop.wait()
        server.close()
        await runner.cleanup()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        reason = str(error)
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            reason = "the port is in use; stop what uses it"
        raise ConfigError(
            f"the service cannot listen on {host}:{port}: {reason}, or choose another with --service-port"
        ) from None
