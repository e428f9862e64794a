"""The server: broker, collector, service, and what follows from changes of the registry, in one process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleet.access import Role
from fleet.cli.broker import mosquitto_keeper, mosquitto_reload
from fleet.cli.lazy import load
from fleet.cli.state import COLLECTOR, State
from fleet.cli.upkeep import Upkeep
from fleet.command import stop_event, wait_stopped

if TYPE_CHECKING:
    from fleet.mqtt import MqttTransport
    from fleet.registry.store import Registry
    from fleet.registry.watcher import ChangeWatcher


@dataclass(frozen=True)
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


def run_server(state: State, options: ServerOptions) -> None:
    """Serves until SIGTERM or SIGINT."""
    broker_class = load("cloud_broker_worker.broker.embedded").EmbeddedBroker
    collector = load("fleet.registry.collector").Collector
    transport = load("fleet.mqtt").MqttTransport
    stop = stop_event()
    listen = options.listen or state.config.host
    with ExitStack() as stack:
        endpoint = stack.enter_context(load("fleet.endpoint").Endpoint(*options.metrics)) if options.metrics else None
        registry = stack.enter_context(state.registry())
        stack.enter_context(load("fleet.registry.retention").Retention(registry, state.config.retention_days))
        host, port, tls = state.config.host, state.config.port, state.server_tls()
        broker = stack.enter_context(broker_class(listen, port, tls, registry.admitted)) if options.has_broker else None
        link = stack.enter_context(transport.connect(state.identity(COLLECTOR, Role.SERVER)))
        collecting = stack.enter_context(collector(link, registry))
        service = stack.enter_context(state.service(registry, listen, tls)) if state.config.service_port else None
        shown = [each for each in (broker, service) if each]
        stack.enter_context(_follow_ups(state, registry, link, options, shown))
        if endpoint:
            endpoint.show(load("fleet.metrics").FleetMonitor(registry, collecting, link, broker))
        opening = f"broker listens on {listen}:{port} (TLS)" if broker else f"collector at the broker on {host}:{port}"
        where = f", service on {service.url}" if service else ""
        where += f", metrics on {endpoint.url}" if endpoint else ""
        print(f"{opening}, registry {state.folder}{where}", flush=True)
        wait_stopped(stop)


def _follow_ups(
    state: State, registry: Registry, link: MqttTransport, options: ServerOptions, shown: Sequence[Any]
) -> ChangeWatcher:
    """What is done after each change of the registry, and again whenever the broker may have forgotten it.

    `shown` are those that show the server's certificate.
    """
    watcher: ChangeWatcher = load("fleet.registry.watcher").ChangeWatcher(registry)
    folders, reloads = [state.folder / "broker"], [each.reload_certificate for each in shown]
    if options.mosquitto:  # first of all: who was revoked is to be out
        reload = mosquitto_reload(options.mosquitto, options.reload)
        watcher.add(mosquitto_keeper(state, registry, options.mosquitto, reload).sync, periodic=True)
        folders.append(options.mosquitto)
        reloads.append(reload)
    configs = load("fleet.registry.publisher").ConfigPublisher(link, registry)
    watcher.add(load("fleet.registry.denials").Denials(link, registry).publish)
    watcher.add(configs.publish)
    watcher.add(load("fleet.registry.rolling").RolloutEngine(registry).step, periodic=True)
    watcher.add(Upkeep(state, folders, reloads).tend, periodic=True)
    for again in (configs.forget, watcher.again):
        link.on_up(again)
    return watcher
