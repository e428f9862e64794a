"""The broker inside this process, on a thread and an event loop of its own."""

from __future__ import annotations

import socket
import ssl

from cloud_broker_worker.broker.fleet_broker import FleetBroker
from cloud_broker_worker.broker.rights_cache import AdmissionRegistry, RightsCache
from fleet.identity.identity import ServerTls
from fleet.transport.tls_server import TlsServer


class EmbeddedBroker(TlsServer):
    """A broker for MQTT 3.1.1 over TLS with client certificates; a `TlsServer`.

    `registry` has the rights of each certificate's holder by name and SHA-256. It is read on
    threads other than the broker's.
    """

    def __init__(self, host: str, port: int, tls: ServerTls, registry: AdmissionRegistry) -> None:
        super().__init__("broker", host, port, tls)
        self._rights = RightsCache(registry)

    async def _serve(self, listener: socket.socket, context: ssl.SSLContext) -> None:
        await FleetBroker(listener, context, self._rights).serve_until(self._until_stopped())
