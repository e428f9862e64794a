"""A TLS server on a thread and an event loop of its own."""

from __future__ import annotations

import socket
import ssl
from abc import abstractmethod
from typing import Self

from fleet.identity.identity import ServerTls
from fleet.transport.threaded_server import ThreadedServer


class TlsServer(ThreadedServer):
    """A `ThreadedServer` with TLS."""

    def __init__(
        self, name: str, host: str, port: int, tls: ServerTls, advice: str = "choose another port"
    ) -> None:
        super().__init__(name, host, port, advice)
        self._tls = tls

    def __enter__(self) -> Self:
        """Listen and start the thread.

        Raises:
            ConfigError: it cannot listen there.
            IdentityError: its certificate does not load.
        """
        self._context = self._ssl_context()
        return super().__enter__()

    def reload_certificate(self) -> None:
        """Use the certificate that is on disk now for new connections.

        Raises:
            IdentityError: it does not load.
        """
        self._tls.load_certificate(self._context)

    @abstractmethod
    async def _serve(self, listener: socket.socket, context: ssl.SSLContext) -> None:
        """Start to serve, await `_until_stopped`, and end within `STOP_S` seconds."""

    async def _serve_on(self, listener: socket.socket) -> None:
        await self._serve(listener, self._context)

    def _ssl_context(self) -> ssl.SSLContext:
        return self._tls.ssl_context()
