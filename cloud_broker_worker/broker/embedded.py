"""The broker inside this process: amqtt on a thread and an event loop of its own."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from typing import TYPE_CHECKING, Self

from cloud_broker_worker.broker.rights_cache import RightsCache, RightsLookup
from fleet.errors import MissingExtraError
from fleet.identity.identity import ServerTls
from fleet.transport.tls_server import STOP_S, TlsServer

if TYPE_CHECKING:
    from cloud_broker_worker.broker.fleet_broker import FleetBroker


class EmbeddedBroker(TlsServer):
    """A broker for MQTT 3.1.1 over TLS with client certificates; a `TlsServer`.

    `lookup` returns the rights of a certificate's holder by name and SHA-256, or None if no
    identity is enrolled with this certificate. It runs on the broker's thread.
    """

    def __init__(self, host: str, port: int, tls: ServerTls, lookup: RightsLookup) -> None:
        super().__init__("broker", host, port, tls)
        self._rights = RightsCache(lookup)

    def __enter__(self) -> Self:
        """Listen and start the thread.

        Raises:
            ConfigError, IdentityError: as `TlsServer`.
            MissingExtraError: amqtt is not installed.
        """
        self._broker_class = _broker_class()
        return super().__enter__()

    async def _serve(self, listener: socket.socket, context: ssl.SSLContext) -> None:
        broker = self._broker_class(listener, context, self._rights)
        await broker.start()
        await self._until_stopped()
        await asyncio.wait_for(broker.shutdown(), STOP_S / 2)


def _broker_class() -> type[FleetBroker]:
    """Import amqtt, which only a broker needs, and silence its log.

    `FleetBroker` logs every refusal itself.
    """
    try:
        from cloud_broker_worker.broker.fleet_broker import FleetBroker
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"the embedded broker needs {error.name}; "
            "install it: pip install 'cecollm-fleet[server]'"
        ) from None
    for name in ("amqtt", "transitions"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return FleetBroker
