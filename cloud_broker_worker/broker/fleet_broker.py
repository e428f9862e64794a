"""amqtt's broker with its doors closed: who a client is gets decided before any session is touched.

amqtt 0.12.1 deletes, or hands over, the session of the claimed client id before it asks its plugins; it publishes a
last will anywhere; and it takes packets of up to 256 MB. See docs/adr/0005.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from typing import Any, Final

from amqtt.adapters import ReaderAdapter, WriterAdapter
from amqtt.broker import Broker
from amqtt.contexts import ListenerConfig
from amqtt.errors import AMQTTError
from amqtt.mqtt.connack import NOT_AUTHORIZED, ConnackPacket
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.session import Session

from cloud_broker_worker.broker.access_plugin import CachedLookup
from fleet.access import Action

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S: Final = 10.0
CLOSE_TIMEOUT_S: Final = 3.0
MAX_PACKET_BYTES: Final = 1 << 20


class LimitedReader(ReaderAdapter):  # type: ignore[misc]
    """Refuses to buffer a packet above `MAX_PACKET_BYTES`; the connection then ends as if the peer had closed it."""

    def __init__(self, reader: ReaderAdapter) -> None:
        self._reader = reader

    async def read(self, n: int = -1) -> bytes:
        if n > MAX_PACKET_BYTES:
            log.warning("a packet of %d bytes was refused; the limit is %d", n, MAX_PACKET_BYTES)
            raise ConnectionResetError("packet too large")
        data: bytes = await self._reader.read(n)
        return data

    def feed_eof(self) -> None:
        self._reader.feed_eof()


class FleetBroker(Broker):  # type: ignore[misc]
    """A client's certificate, client id and user name are one name, and the registry knows it."""

    def __init__(self, config: dict[str, Any], lookup: CachedLookup) -> None:
        super().__init__(config)
        self._lookup = lookup

    @staticmethod
    def _create_ssl_context(listener: ListenerConfig) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=listener["cafile"])
        context.load_cert_chain(listener["certfile"], listener["keyfile"])
        context.verify_mode = ssl.CERT_REQUIRED
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context

    async def _client_connected(self, listener_name: str, reader: ReaderAdapter, writer: WriterAdapter) -> None:
        try:
            await super()._client_connected(listener_name, LimitedReader(reader), writer)
        except (ConnectionError, ssl.SSLError) as error:
            log.debug("a connection broke: %s", error)

    async def _initialize_client_session(
        self, reader: ReaderAdapter, writer: WriterAdapter, remote_address: str, remote_port: int
    ) -> tuple[BrokerProtocolHandler, Session]:
        try:
            handler, session = await asyncio.wait_for(
                BrokerProtocolHandler.init_from_connect(reader, writer, self.plugins_manager), CONNECT_TIMEOUT_S
            )
        except Exception as error:  # whatever a stranger's first bytes make the parser raise
            await self._hang_up(writer)
            raise AMQTTError(f"no valid CONNECT from {remote_address}:{remote_port}: {error!r}") from error
        if refusal := self._refusal(_common_name(writer), session):
            log.warning("connection from %s:%d refused: %s", remote_address, remote_port, refusal)
            await ConnackPacket.build(0, NOT_AUTHORIZED).to_stream(writer)
            await self._hang_up(writer)
            raise AMQTTError(refusal)
        await self._take_over(session.client_id)
        session.clean_session, session.parent = True, 0
        return handler, session

    def _refusal(self, name: str | None, session: Session) -> str | None:
        """Why a client may not come in, or None."""
        if name is None or session.client_id != name or session.username not in (None, name):
            return f"certificate of {name!r}, client id {session.client_id!r}, user {session.username!r}: expected one name"
        grants = self._lookup.fresh(name)
        if grants is None:
            return f"{name!r} is not enrolled"
        if session.will_flag and not grants.may(Action.PUBLISH, session.will_topic):
            return f"{name!r} may not publish its last will on {session.will_topic!r}"
        return None

    async def _take_over(self, client_id: str) -> None:
        """Ends the connection that this client has left behind, without its will: its successor is here."""
        if client_id in self._sessions:
            session, handler = self._sessions[client_id]
            session.will_flag = False
            if session.transitions.is_connected():
                await handler.handle_connection_closed()
                await handler.stop()
            await self._delete_session(client_id)

    @staticmethod
    async def _hang_up(writer: WriterAdapter) -> None:
        try:
            await asyncio.wait_for(writer.close(), CLOSE_TIMEOUT_S)
        except (OSError, TimeoutError) as error:
            log.debug("closing a refused connection: %r", error)


def _common_name(writer: WriterAdapter) -> str | None:
    """The CN of the peer's certificate, which TLS has verified."""
    tls = writer.get_ssl_info()
    certificate = tls.getpeercert() if tls else None
    for attribute in (certificate or {}).get("subject", ()):
        for key, value in attribute:
            if key == "commonName":
                return str(value)
    return None
