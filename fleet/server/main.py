"""The server: broker, collector, service, and what follows from changes of the registry, in one process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleet.cli.broker import mosquitto_keeper, mosquitto_reload
from fleet.protocol.access import Role
from fleet.server.certificate_renewal_task import CertificateRenewalTask
from fleet.server.home import COLLECTOR, FleetHome
from fleet.utils.cli_runtime import stop_event, wait_stopped
from fleet.utils.optional_imports import load

if TYPE_CHECKING:
    from fleet.registry.store import Registry
    from fleet.server.change_watcher import ChangeWatcher
    from fleet.transport.mqtt import MqttTransport


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Broker and service listen on the address `listen`, the fleet's own when it is None.

    Without `has_broker` the broker runs elsewhere; `mosquitto` is then the folder of one that is to follow the
    registry, and `reload` the command that tells it. `metrics` is where to tell of the server.
    """

    listen: str | None = None
    has_broker: bool = True
    mosquitto: Path | None = None
    reload: str | None = None
    metrics: tuple[str, int] | None = None


def run_server(state: FleetHome, options: ServerOptions) -> None:
    """Serves until SIGTERM or SIGINT."""
    broker_class = load("cloud_broker_worker.broker.embedded").EmbeddedBroker
    collector = load("fleet.server.collector").Collector
    transport = load("fleet.transport.mqtt").MqttTransport
    stop = stop_event()
    listen = options.listen or state.config.host
    with ExitStack() as stack:
        endpoint = (
            stack.enter_context(
                load("fleet.monitoring.http_endpoint").HttpEndpoint(*options.metrics)
            )
            if options.metrics
            else None
        )
        registry = stack.enter_context(state.registry())
        stack.enter_context(
            load("fleet.server.retention").Retention(registry, state.config.retention_days)
        )
        host = state.config.host
        port = state.config.port
        tls = state.server_tls()
        broker = (
            stack.enter_context(broker_class(listen, port, tls, registry.admitted))
            if options.has_broker
            else None
        )
        link = stack.enter_context(transport.connect(state.identity(COLLECTOR, Role.SERVER)))
        collecting = stack.enter_context(collector(link, registry))
        service = (
            stack.enter_context(state.service(registry, listen, tls))
            if state.config.service_port
            else None
        )
        shown = [each for each in (broker, service) if each]
        stack.enter_context(_follow_ups(state, registry, link, options, shown))
        if endpoint:
            endpoint.show(
                load("fleet.server.metrics").FleetMonitor(registry, collecting, link, broker)
            )
        opening = (
            f"broker listens on {listen}:{port} (TLS)"
            if broker
            else f"collector at the broker on {host}:{port}"
        )
        where = f", service on {service.url}" if service else ""
        where += f", metrics on {endpoint.url}" if endpoint else ""
        print(f"{opening}, registry {state.folder}{where}", flush=True)
        wait_stopped(stop)


def _follow_ups(
    state: FleetHome,
    registry: Registry,
    link: MqttTransport,
    options: ServerOptions,
    shown: Sequence[Any],
) -> ChangeWatcher:
    """What is done after each change of the registry, and again whenever the broker may have forgotten it.

    `shown` are those that show the server's certificate.
    """
    watcher: ChangeWatcher = load("fleet.server.change_watcher").ChangeWatcher(registry)
    folders = [state.folder / "broker"]
    reloads = [each.reload_certificate for each in shown]
    if options.mosquitto:  # first of all: who was revoked is to be out
        reload = mosquitto_reload(options.mosquitto, options.reload)
        watcher.add(
            mosquitto_keeper(state, registry, options.mosquitto, reload).sync, periodic=True
        )
        folders.append(options.mosquitto)
        reloads.append(reload)
    configs = load("fleet.server.config_publisher").ConfigPublisher(link, registry)
    watcher.add(load("fleet.server.denylist_publisher").DenylistPublisher(link, registry).publish)
    watcher.add(configs.publish)
    watcher.add(load("fleet.registry.rollouts.steps").RolloutEngine(registry).step, periodic=True)
    watcher.add(CertificateRenewalTask(state, folders, reloads).tend, periodic=True)
    for again in (configs.forget, watcher.again):
        link.on_up(again)
    return watcher
