"""The fleet's HTTP API in the server process: its server, and its tasks."""

from __future__ import annotations

from contextlib import ExitStack

from fleet.http_api.api_certificate import ApiCertificate
from fleet.http_api.api_server import ApiServer
from fleet.identity.identity import ServerTls
from fleet.registry.store import Registry
from fleet.server.change_watcher import ChangeWatcher
from fleet.server.gateway.api_options import ApiOptions
from fleet.server.gateway.fleet_backend import FleetBackend
from fleet.server.gateway.key_access import KeyAccess
from fleet.transport.base import Transport


def start_api(
    stack: ExitStack,
    link: Transport,
    registry: Registry,
    watcher: ChangeWatcher,
    options: ApiOptions,
    tls: ServerTls,
) -> ApiServer:
    """Start the API on `stack`, and add its tasks to `watcher`.

    `link` has the rights of a gateway. `tls` are the files of the fleet's own certificate.

    Raises:
        ConfigError: it cannot listen, or a certificate cannot be used.
        RegistryError: the registry is not available.
    """
    certificate = web_certificate(options, tls)
    access = KeyAccess(registry)
    access.follow()
    backend = stack.enter_context(FleetBackend(link, access))
    watcher.add(access.follow)
    watcher.add(backend.end_invalid, periodic=True)
    if certificate:
        watcher.add(certificate.follow, periodic=True)
    context = certificate.context if certificate else None
    return stack.enter_context(ApiServer(options.address, backend, context, needs_key=True))


def web_certificate(options: ApiOptions, tls: ServerTls) -> ApiCertificate | None:
    """Return the certificate of a web server; None where only this machine can connect.

    Raises:
        ConfigError: it cannot be used.
    """
    if options.cert_file and options.key_file:
        return ApiCertificate(options.cert_file, options.key_file)
    return None if options.address.is_local else ApiCertificate(tls.cert_file, tls.key_file)
