"""The server process: broker, collector, service, and the tasks that follow the registry."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cloud_broker_worker.broker.embedded import EmbeddedBroker
from fleet.identity.identity import ServerTls
from fleet.protocol.access import Role
from fleet.protocol.types import DAY_S
from fleet.registry.store import Registry
from fleet.server.alarm_evaluator import AlarmEvaluator, facts_from
from fleet.server.certificate_renewal_task import CertificateRenewalTask
from fleet.server.change_watcher import ChangeWatcher
from fleet.server.collector import Collector
from fleet.server.config_publisher import ConfigPublisher
from fleet.server.denylist_publisher import DenylistPublisher
from fleet.server.home import COLLECTOR, CONSOLE_GATEWAY, GATEWAY, FleetHome
from fleet.server.mosquitto import make_sync, reload_by
from fleet.server.report_admission import ReportRules
from fleet.server.retained_cleaner import RetainedCleaner
from fleet.server.retention import Retention
from fleet.server.rollout_engine import RolloutEngine
from fleet.transport.mqtt import MqttTransport
from fleet.transport.threaded_server import ThreadedServer
from fleet.transport.tls_server import TlsServer
from fleet.utils.cli_runtime import stop_event, wait_stopped
from fleet.utils.host_address import host_port
from fleet.utils.service_manager import READY, Watchdog, notify
from provisioning.authority import CertificateAuthority

if TYPE_CHECKING:
    from fleet.http_api.api_server import ApiServer
    from fleet.monitoring.http_endpoint import HttpEndpoint
    from fleet.server.console.console_server import ConsoleServer
    from fleet.server.gateway.api_options import ApiOptions

LINK_S: Final = 5.0  # longest wait for the link to the broker before the server reports ready


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Options of `fleet server`.

    Broker and service listen on the address `listen`, the fleet's own when it is None. Without
    `has_broker` the broker runs elsewhere. `mosquitto` is then the folder of a mosquitto whose
    files the server keeps equal to the registry, and `reload` the command that makes mosquitto read
    them. `metrics` is the address of the HTTP endpoint, and `api` are the options of the HTTP API.
    """

    listen: str | None = None
    has_broker: bool = True
    mosquitto: Path | None = None
    reload: str | None = None
    metrics: tuple[str, int] | None = None
    api: ApiOptions | None = None
    console: ApiOptions | None = None


def run_server(home: FleetHome, options: ServerOptions) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = stop_event()
    with ExitStack() as stack:
        print(_start(stack, home, options, stop), flush=True)
        notify(READY)
        wait_stopped(stop)


def _start(stack: ExitStack, home: FleetHome, options: ServerOptions, stop: threading.Event) -> str:
    """Start everything on `stack`; return the line that announces the server.

    A broker that runs elsewhere may start later: only the link to it waits, the service does not.
    """
    config = home.config
    listen = options.listen or config.host
    endpoint = _open_endpoint(stack, options.metrics)
    registry = stack.enter_context(home.registry())
    stack.enter_context(Retention(registry, config.retention_days))
    home.keep_own_bundle()
    authority = home.authority()
    tls = home.server_tls()
    broker = service = None
    if options.has_broker:
        broker = stack.enter_context(EmbeddedBroker(listen, config.port, tls, registry))
    identity = home.identity(COLLECTOR, Role.SERVER)
    link = stack.enter_context(MqttTransport.connect(identity, wait=False))
    rules = ReportRules(max_age_s=config.retention_days * DAY_S, exits_of=home.bundle_exits)
    collector = stack.enter_context(Collector(link, registry, rules=rules))
    if config.service_port:
        service = stack.enter_context(home.service(registry, listen, tls, authority))
    tls_servers = [each for each in (broker, service) if each]
    watcher = _change_watcher(home, registry, link, options, authority, tls_servers)
    api = _start_api(stack, home, registry, watcher, options.api, tls)
    console = _start_console(stack, home, registry, watcher, options.console, tls)
    _watch_progress(collector, watcher, *tls_servers, *filter(None, [api, console]))
    stack.enter_context(watcher)
    if endpoint:
        from fleet.server.metrics import FleetMonitor

        endpoint.show(FleetMonitor(registry, collector, link, broker))
    link.wait_up(stop, LINK_S)
    line = f"collector at the broker on {host_port(config.host, config.port)}"
    if broker:
        line = f"broker listens on {host_port(listen, config.port)} (TLS)"
    line += f", registry {home.folder}"
    line += f", service on {service.url}" if service else ""
    line += f", API on {api.url}" if api else ""
    line += f", console on {console.url}" if console else ""
    return line + (f", metrics on {endpoint.url}" if endpoint else "")


def _start_api(
    stack: ExitStack,
    home: FleetHome,
    registry: Registry,
    watcher: ChangeWatcher,
    options: ApiOptions | None,
    tls: ServerTls,
) -> ApiServer | None:
    if options is None:
        return None
    from fleet.server.gateway.api_gateway import start_api

    identity = home.identity(GATEWAY, Role.GATEWAY)
    link = stack.enter_context(MqttTransport.connect(identity, wait=False))
    return start_api(stack, link, registry, watcher, options, tls)


def _start_console(
    stack: ExitStack,
    home: FleetHome,
    registry: Registry,
    watcher: ChangeWatcher,
    options: ApiOptions | None,
    tls: ServerTls,
) -> ConsoleServer | None:
    if options is None:
        return None
    from fleet.server.console.console_server import start_console
    from fleet.server.console.pages.page_routes import page_routes
    from fleet.server.console.playground import Playground
    from fleet.server.gateway.api_gateway import web_certificate
    from fleet.server.operations.context import OperationContext

    certificate = web_certificate(options, tls)
    if certificate:
        watcher.add(certificate.follow, periodic=True)
    context = OperationContext(registry, home)
    identity = home.identity(CONSOLE_GATEWAY, Role.GATEWAY)
    link = stack.enter_context(MqttTransport.connect(identity, wait=False))
    playground = stack.enter_context(Playground(link))
    web_tls = certificate.context if certificate else None
    routes = [page_routes, playground.routes]
    return start_console(stack, options.address, context, web_tls, routes)


def _watch_progress(*loops: Collector | ChangeWatcher | ThreadedServer) -> None:
    """Report to the service manager while each of these loops makes progress."""
    watchdog = Watchdog()
    for number, loop in enumerate(loops):
        loop.on_cycle = watchdog.watch(f"{type(loop).__name__}-{number}")


def _open_endpoint(stack: ExitStack, address: tuple[str, int] | None) -> HttpEndpoint | None:
    if address is None:
        return None
    from fleet.monitoring.http_endpoint import HttpEndpoint

    return stack.enter_context(HttpEndpoint(*address))


def _change_watcher(
    home: FleetHome,
    registry: Registry,
    link: MqttTransport,
    options: ServerOptions,
    authority: CertificateAuthority,
    tls_servers: Sequence[TlsServer],
) -> ChangeWatcher:
    """Return the watcher that runs the server's tasks after each change of the registry, and after
    each new connection to the broker.

    `tls_servers` present the server's certificate. `authority` is the object that the service signs
    with; it follows a rotation.
    """
    watcher = ChangeWatcher(registry)
    folders = [home.folder / "broker"]
    reloads: list[Callable[[], None]] = [each.reload_certificate for each in tls_servers]
    if options.mosquitto:  # the first task: a revoked client must lose its connection soon
        reload = reload_by(options.mosquitto, options.reload)
        sync = make_sync(home, registry, options.mosquitto, reload, authority)
        watcher.add(sync.sync, periodic=True)
        folders.append(options.mosquitto)
        reloads.append(reload)
    configs = ConfigPublisher(link, registry)
    cleaner = RetainedCleaner(link, registry)
    watcher.add(DenylistPublisher(link, registry).publish)
    watcher.add(configs.publish)
    watcher.add(cleaner.clear)
    watcher.add(RolloutEngine(registry).step, periodic=True)
    watcher.add(AlarmEvaluator(registry, facts_from(home), link).step, periodic=True)
    renewal = CertificateRenewalTask(home, folders, reloads, authority)
    watcher.add(renewal.run, periodic=True)
    for callback in (configs.reset, cleaner.reset, watcher.run_again):
        link.on_up(callback)
    return watcher
