"""The broker inside this process: amqtt on a thread and an event loop of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import Future
from types import TracebackType
from typing import Final, Self

from amqtt.errors import BrokerError

from cloud_broker_worker.broker.access_plugin import CachedLookup, FleetAccess, Lookup
from cloud_broker_worker.broker.fleet_broker import FleetBroker
from fleet.errors import LinkError
from fleet.identity import ServerTls

START_TIMEOUT_S: Final = 10.0
STOP_TIMEOUT_S: Final = 5.0


class EmbeddedBroker:
    """MQTT 3.1.1 over TLS with client certificates; `port` 0 takes a free one."""

    def __init__(self, host: str, port: int, tls: ServerTls, lookup: Lookup) -> None:
        self.host = host
        self.port = port
        self._tls = tls
        self._lookup = CachedLookup(lookup)
        self._started: Future[int] = Future()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="broker", daemon=True)
        for name in ("amqtt", "transitions"):
            logging.getLogger(name).setLevel(logging.CRITICAL)

    def __enter__(self) -> Self:
        """Raises LinkError when it cannot listen."""
        self._thread.start()
        self.port = self._started.result(START_TIMEOUT_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        broker = FleetBroker(self._config(), self._lookup)
        try:
            await broker.start()
        except BrokerError as error:
            self._started.set_exception(
                LinkError(f"the broker cannot listen on {self.host}:{self.port}: {error}; choose another port")
            )
            return
        self._started.set_result(broker._servers["default"].instance.sockets[0].getsockname()[1])
        await self._stop.wait()
        await broker.shutdown()

    def _config(self) -> dict[str, object]:
        plugin = f"{FleetAccess.__module__}.{FleetAccess.__qualname__}"
        listener = {
            "type": "tcp", "bind": f"{self.host}:{self.port}", "ssl": True, "cafile": str(self._tls.ca_file),
            "certfile": str(self._tls.cert_file), "keyfile": str(self._tls.key_file),
        }  # fmt: skip
        return {"listeners": {"default": listener}, "plugins": {plugin: {"lookup": self._lookup}}}
