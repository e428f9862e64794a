"""The HTTP endpoint of a process for an operator's tools: liveness, readiness and metrics."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Final, Protocol, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Metric, ProcessCollector, make_wsgi_app

from fleet.errors import ConfigError, FleetError
from fleet.utils.host_address import address_family, host_port, listen_remedy

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

STOP_TIMEOUT_S: Final = 5.0

log = logging.getLogger(__name__)


class Monitor(Protocol):
    """The state of a process; it is read on the endpoint's threads."""

    def collect(self) -> Iterable[Metric]:
        """Read the metrics; raise FleetError if they cannot be read."""
        ...

    def why_unhealthy(self) -> str | None:
        """Return the reason why the process must be restarted, or None."""
        ...

    def why_unready(self) -> str | None:
        """Return the reason why the process serves no requests now, or None."""
        ...


class HttpEndpoint:
    """A context manager that serves `/healthz`, `/readyz` and `/metrics` at `url`.

    For `port` 0 it chooses a free one. Until it has a monitor the process is alive and not ready.
    """

    def __init__(self, host: str, port: int) -> None:
        """Listen on `host` and `port`.

        Raises:
            ConfigError: it cannot listen there.
        """
        self._monitor: Monitor | None = None
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._metrics: WSGIApplication = make_wsgi_app(self._registry)
        try:
            self._server = make_server(host, port, self._app, _server_class(host), _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"cannot serve metrics on {host_port(host, port)}: "
                + listen_remedy(error, "choose another --metrics-host or --metrics-port")
            ) from None
        self.url = f"http://{host_port(host, self._server.server_port)}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="endpoint", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join(STOP_TIMEOUT_S)
        self._server.server_close()

    def show(self, monitor: Monitor) -> None:
        """Publish the metrics and the state of `monitor` from now on."""
        self._registry.register(_Collector(monitor.collect))
        self._monitor = monitor

    def _app(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        monitor = self._monitor
        path = environ["PATH_INFO"]
        if path == "/metrics":
            try:
                return self._metrics(environ, start_response)
            except FleetError as error:
                return _health(start_response, str(error))
        if path == "/healthz":
            return _health(start_response, monitor.why_unhealthy() if monitor else None)
        if path == "/readyz":
            return _health(start_response, monitor.why_unready() if monitor else "it is starting")
        return _text(start_response, "404 Not Found", "expected /healthz, /readyz or /metrics")


def _health(start_response: StartResponse, problem: str | None) -> Iterable[bytes]:
    status = "503 Service Unavailable" if problem else "200 OK"
    return _text(start_response, status, problem or "ok")


def _text(start_response: StartResponse, status: str, line: str) -> Iterable[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [f"{line}\n".encode()]


class _Collector:
    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self.collect = collect

    def describe(self) -> Iterable[Metric]:
        """Return no metrics; otherwise the registry would collect all of them at the start."""
        return []


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Log an error, but no line for each client that resets its connection."""
        if not isinstance(sys.exception(), OSError):
            log.exception("a request for metrics failed")


def _server_class(host: str) -> type[_Server]:
    """Return a server for the family of `host`, IPv4 or IPv6. Raises OSError."""
    return type("_Server", (_Server,), {"address_family": address_family(host)})


class _Handler(WSGIRequestHandler):
    timeout = 10.0  # a silent client does not occupy its thread

    def log_message(self, *_: object) -> None:
        """Log no line for each scrape."""
