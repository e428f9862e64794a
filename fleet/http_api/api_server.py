"""The server of an HTTP API."""

from __future__ import annotations

import ssl

from aiohttp import web

from fleet.http_api.api_address import ApiAddress
from fleet.http_api.application import api_refusal, http_application
from fleet.http_api.backend import ApiBackend
from fleet.http_api.http_server import HttpServer
from fleet.transport.http_listener import HttpConnection


class _Connection(HttpConnection):
    """A client's connection; a request that aiohttp refuses has an error of an API, too."""

    def refusal(self, status: int) -> web.Response:
        return api_refusal(status)


class ApiServer(HttpServer):
    """The server, as a context manager.

    Where only this machine can connect, requests must name it as their host: a web page that makes
    its own name an address of this machine is refused. With `needs_key` each host is accepted,
    because such a page has no key, and a reverse proxy may forward the host of its own.
    """

    connection_type = _Connection

    def __init__(
        self,
        address: ApiAddress,
        backend: ApiBackend,
        tls: ssl.SSLContext | None = None,
        *,
        needs_key: bool = False,
    ) -> None:
        super().__init__("API", address.host, address.port, "choose another with --api", tls)
        self._hosts = None if needs_key else address.request_hosts
        self._backend = backend

    def _application(self) -> web.Application:
        return http_application(self._backend, self._hosts)
