"""`fleet up` and `fleet server`: broker, registry, collector, service and workers."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from fleet.access import Role
from fleet.cli.lazy import load, require
from fleet.cli.processes import DRAIN_TIMEOUT_S, Child, child
from fleet.cli.state import COLLECTOR, WORKER, State
from fleet.command import stop_event
from fleet.errors import ConfigError, FleetError

WATCH_S: Final = 0.2


def check_port(host: str, port: int, option: str = "--port") -> None:
    """Raises ConfigError, which names the `option` for another port, when nothing can listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror}; stop what uses it or choose another with {option}"
            ) from None


def free_port(host: str) -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def run_server(state: State, listen: str | None, metrics: tuple[str, int] | None = None) -> None:
    """Collector, broker and the HTTPS service in this process, until SIGTERM or SIGINT.

    The latter two listen on the address `listen`; without one the broker runs elsewhere, and there is no service.
    `metrics` is where to tell of them.
    """
    broker_class = load("cloud_broker_worker.broker.embedded").EmbeddedBroker
    collector = load("fleet.registry.collector").Collector
    transport = load("fleet.mqtt").MqttTransport
    stop = stop_event()
    with ExitStack() as stack:
        endpoint = stack.enter_context(load("fleet.endpoint").Endpoint(*metrics)) if metrics else None
        registry = stack.enter_context(state.registry())
        stack.enter_context(load("fleet.registry.retention").Retention(registry, state.config.retention_days))
        host, port = state.config.host, state.config.port
        tls = state.server_tls()
        broker = listen and stack.enter_context(broker_class(listen, port, tls, registry.grants))
        link = stack.enter_context(transport.connect(state.identity(COLLECTOR, Role.SERVER)))
        collecting = stack.enter_context(collector(link, registry))
        service = None
        if listen and state.config.service_port:
            service = stack.enter_context(state.service(registry, listen, tls))
        if endpoint:
            endpoint.show(load("fleet.metrics").FleetMonitor(registry, collecting, link, broker))
        opening = f"broker listens on {listen}:{port} (TLS)" if broker else f"collector at the broker on {host}:{port}"
        where = f", service on {service.url}" if service else ""
        where += f", metrics on {endpoint.url}" if endpoint else ""
        print(f"{opening}, registry {state.folder}{where}", flush=True)
        stop.wait()


@contextmanager
def fleet_processes(
    state: State, num_workers: int = 1, metrics_port: int | None = None
) -> Iterator[tuple[Child, list[Child]]]:
    """Broker with registry, then workers, as child processes; all are ready or starting when the block begins.

    With a `metrics_port` the server tells of itself there, and the workers on the ports that follow.
    """
    check_port(state.config.host, state.config.port)
    if state.config.service_port:
        check_port(state.config.host, state.config.service_port, "--service-port")
    require("worker", "torch", "transformers")
    ports = [
        [] if metrics_port is None else ["--metrics-port", str(metrics_port and metrics_port + i)]
        for i in range(num_workers + 1)
    ]
    # Workers share the machine's cores; one alone takes as many as it thinks best.
    threads = [] if num_workers == 1 else ["--threads", str(max(1, (os.cpu_count() or 1) // num_workers))]
    options = ["--bundle", state.config.bundle, "--drain-timeout", str(DRAIN_TIMEOUT_S), *threads]
    with ExitStack() as stack:
        server = stack.enter_context(
            child("the broker", "fleet.cli", "server", "--state", str(state.folder), *ports[0])
        )
        server.wait_ready()
        workers = []
        for number in range(1, num_workers + 1):
            name = WORKER.replace("1", str(number))
            folder = state.identity(name, Role.WORKER).folder
            command = ("cloud_broker_worker", "run", str(folder), *options, *ports[number])
            workers.append(stack.enter_context(child(f"worker {name}", *command)))
        for worker in workers:  # all drain at the same time
            stack.callback(worker.ask_to_stop)
        yield server, workers


def watch(server: Child, workers: list[Child], stop: threading.Event) -> None:
    """Waits until `stop` is set, and says which worker has ended meanwhile.

    Raises:
        FleetError: the server has ended, or the last of the workers.
    """
    serving = list(workers)
    while not stop.wait(WATCH_S):
        for ended in [process for process in (server, *serving) if process.process.poll() is not None]:
            line = f"{ended.title} ended with exit status {ended.process.returncode}"
            if ended is server or len(serving) == 1:
                raise FleetError(f"{line}; see above")
            serving.remove(ended)
            print(f"fleet: {line}; {len(serving)} of {len(workers)} workers go on", file=sys.stderr, flush=True)


def resolve_bundle(bundle: Path | None, say: object) -> Path:
    """The bundle that was named, or the default model's, which is fetched and built when it is missing."""
    if bundle is not None:
        return bundle.resolve()
    path: Path = load("onnx_export.default").default_bundle(say)
    return path
