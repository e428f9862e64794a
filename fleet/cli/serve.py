"""`fleet up` and `fleet server`: broker, registry, collector and worker."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fleet.access import Role
from fleet.cli.lazy import load, require
from fleet.cli.processes import Child, child
from fleet.cli.state import COLLECTOR, WORKER, State
from fleet.command import stop_event
from fleet.errors import ConfigError


def check_port(host: str, port: int) -> None:
    """Raises ConfigError when nothing can listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror}; stop what uses it or choose another with --port"
            ) from None


def free_port(host: str) -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def run_server(state: State) -> None:
    """Broker and collector in this process, until SIGTERM or SIGINT."""
    broker = load("cloud_broker_worker.broker.embedded").EmbeddedBroker
    collector = load("fleet.registry.collector").Collector
    transport = load("fleet.mqtt").MqttTransport
    stop = stop_event()
    with (
        state.registry() as registry,
        broker(state.config.host, state.config.port, state.server_tls(), registry.grants),
        transport.connect(state.identity(COLLECTOR, Role.SERVER)) as link,
    ):
        collector(link, registry)
        print(f"broker listens on {state.config.host}:{state.config.port} (TLS), registry {state.folder}", flush=True)
        stop.wait()


@contextmanager
def fleet_processes(state: State) -> Iterator[tuple[Child, Child]]:
    """Broker with registry, then a worker, as child processes; both are ready or starting when the block begins."""
    check_port(state.config.host, state.config.port)
    require("worker", "torch", "transformers")
    with child("the broker", "fleet.cli", "server", "--state", str(state.folder)) as server:
        server.wait_ready()
        folder = state.identity(WORKER, Role.WORKER).folder
        with child("the worker", "cloud_broker_worker", "run", str(folder), "--bundle", state.config.bundle) as worker:
            yield server, worker


def resolve_bundle(bundle: Path | None, say: object) -> Path:
    """The bundle that was named, or the default model's, which is fetched and built when it is missing."""
    if bundle is not None:
        return bundle.resolve()
    path: Path = load("onnx_export.default").default_bundle(say)
    return path
