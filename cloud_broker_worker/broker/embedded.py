"""The broker inside this process: amqtt on a thread and an event loop of its own."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
import threading
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from cloud_broker_worker.broker.rights import Lookup, Rights
from fleet.errors import ConfigError, MissingExtraError
from fleet.identity import ServerTls

if TYPE_CHECKING:
    from cloud_broker_worker.broker.fleet_broker import FleetBroker

START_S: Final = 10.0
STOP_S: Final = 5.0

logger = logging.getLogger(__name__)


class EmbeddedBroker:
    """MQTT 3.1.1 over TLS with client certificates; `port` 0 takes a free one, which `port` then says.

    `lookup` gives what the holder of a certificate may do by the registry, by name and SHA-256; None for who is not
    enrolled, or not with this certificate. It runs on the broker's thread.
    """

    def __init__(self, host: str, port: int, tls: ServerTls, lookup: Lookup) -> None:
        self.host = host
        self.port = port
        self._tls = tls
        self._rights = Rights(lookup)
        self._started: Future[asyncio.AbstractEventLoop] = Future()
        self._stop = asyncio.Event()

    def __enter__(self) -> Self:
        """Raises ConfigError when it cannot listen there, IdentityError when its certificate does not load."""
        broker_class, self._context = _broker_class(), self._tls.ssl_context()
        listener = _listen(self.host, self.port)
        self.port = listener.getsockname()[1]
        self._thread = threading.Thread(
            target=self._run, args=(broker_class, listener, self._context), name="broker", daemon=True
        )
        self._thread.start()
        self._loop = self._started.result(START_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(STOP_S)

    def reload_certificate(self) -> None:
        """Shows the certificate that is on disk now to whoever connects from then on; raises IdentityError."""
        self._tls.load_certificate(self._context)

    @property
    def is_serving(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def _run(self, broker_class: type[FleetBroker], listener: socket.socket, context: ssl.SSLContext) -> None:
        try:
            with listener:
                asyncio.run(self._serve(broker_class, listener, context))
        except Exception as error:
            if self._started.done():
                logger.exception("the broker on port %d stopped", self.port)
            else:
                self._started.set_exception(error)

    async def _serve(self, broker_class: type[FleetBroker], listener: socket.socket, context: ssl.SSLContext) -> None:
        broker = broker_class(listener, context, self._rights)
        await broker.start()
        self._started.set_result(asyncio.get_running_loop())
        await self._stop.wait()
        await asyncio.wait_for(broker.shutdown(), STOP_S / 2)


def _broker_class() -> type[FleetBroker]:
    """amqtt is imported only where a broker runs, and says nothing of its own: our lines name every refusal."""
    try:
        from cloud_broker_worker.broker.fleet_broker import FleetBroker
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"the embedded broker needs {error.name}; install it: pip install 'cecollm-fleet[server]'"
        ) from None
    for name in ("amqtt", "transitions"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return FleetBroker


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        reason = (
            "the port is in use; stop what uses it"
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            else str(error)
        )
        raise ConfigError(f"the broker cannot listen on {host}:{port}: {reason}, or choose another port") from None
