"""What an operator's tools ask of a process over HTTP: is it alive, does it serve, and what has it counted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Metric, ProcessCollector, make_wsgi_app

from fleet.errors import ConfigError, FleetError

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

STOP_TIMEOUT_S: Final = 5.0


class Monitor(Protocol):
    """What a process tells of itself; asked on the endpoint's threads."""

    def collect(self) -> Iterable[Metric]:
        """Its metrics, read now; a FleetError says why there are none."""
        ...

    def why_unhealthy(self) -> str | None:
        """None, or why it has to be started again."""
        ...

    def why_unready(self) -> str | None:
        """None, or why nobody should be sent to it now."""
        ...


class HttpEndpoint:
    """Serves `/healthz`, `/readyz` and `/metrics`; `port` 0 takes a free one, as `url` then says.

    Before it is given a monitor the process is alive and not ready.
    """

    def __init__(self, host: str, port: int) -> None:
        """Raises ConfigError when it cannot listen there."""
        self._monitor: Monitor | None = None
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._metrics: WSGIApplication = make_wsgi_app(self._registry)
        try:
            self._server = make_server(host, port, self._app, _Server, _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"cannot serve metrics on {host}:{port}: {error}; stop what uses it or choose another --metrics-port"
            ) from None
        self.url = f"http://{host}:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="endpoint", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join(STOP_TIMEOUT_S)
        self._server.server_close()

    def show(self, monitor: Monitor) -> None:
        """Begins to tell what `monitor` says."""
        self._registry.register(_Collector(monitor.collect))
        self._monitor = monitor

    def _app(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        monitor = self._monitor
        path = environ["PATH_INFO"]
        if path == "/metrics":
            try:
                return self._metrics(environ, start_response)
            except FleetError as error:
                return _verdict(start_response, str(error))
        if path == "/healthz":
            return _verdict(start_response, monitor.why_unhealthy() if monitor else None)
        if path == "/readyz":
            return _verdict(start_response, monitor.why_unready() if monitor else "it is starting")
        return _text(start_response, "404 Not Found", "expected /healthz, /readyz or /metrics")


def _verdict(start_response: StartResponse, problem: str | None) -> Iterable[bytes]:
    return _text(
        start_response, "503 Service Unavailable" if problem else "200 OK", problem or "ok"
    )


def _text(start_response: StartResponse, status: str, line: str) -> Iterable[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [f"{line}\n".encode()]


class _Collector:
    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self.collect = collect

    def describe(self) -> Iterable[Metric]:
        """Nothing: otherwise the registry would ask for all metrics once at the start."""
        return []


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    timeout = 10.0  # a client that says nothing does not keep its thread

    def log_message(self, *_: object) -> None:
        """Nothing: a line for every scrape tells nobody anything."""
