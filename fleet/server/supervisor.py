"""`fleet up`: the server, a broker beside it, and workers, as child processes."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import msgspec

from fleet.cli.broker import start_mosquitto
from fleet.errors import ConfigError, FleetError
from fleet.identity.identity import Identity
from fleet.protocol.access import Role
from fleet.server.child_process import DRAIN_TIMEOUT_S, Child, child, running
from fleet.server.home import EMBEDDED, MOSQUITTO, WORKER, FleetHome
from fleet.utils.optional_imports import load, require

WATCH_S: Final = 0.2


def check_broker(broker: str) -> None:
    """Raises ConfigError when `fleet up` cannot start such a broker."""
    if broker not in (EMBEDDED, MOSQUITTO):
        raise ConfigError(f"--broker {broker}: expected {EMBEDDED} or {MOSQUITTO}")
    if broker == MOSQUITTO:
        load("cloud_broker_worker.broker.mosquitto").find_mosquitto()


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


@contextmanager
def fleet_processes(
    state: FleetHome, num_workers: int = 1, metrics_port: int | None = None, broker: str = EMBEDDED
) -> Iterator[tuple[list[Child], list[Child]]]:
    """Broker and registry, then workers, as child processes; all are ready or starting when the block begins.

    The embedded broker is the server's own; mosquitto is a process beside it. With a `metrics_port` the server tells of
    itself there, and the workers on the ports that follow.
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
    threads = (
        [] if num_workers == 1 else ["--threads", str(max(1, (os.cpu_count() or 1) // num_workers))]
    )
    options = ["--bundle", state.config.bundle, "--drain-timeout", str(DRAIN_TIMEOUT_S), *threads]
    names = [worker_name(number) for number in range(1, num_workers + 1)]
    folders = {name: worker_folder(state, name, shares=broker == MOSQUITTO) for name in names}
    with ExitStack() as stack:
        servers = stack.enter_context(server_processes(state, ports[0], broker))
        workers = []
        for number, (name, folder) in enumerate(folders.items(), start=1):
            command = ("cloud_broker_worker", "run", str(folder), *options, *ports[number])
            workers.append(stack.enter_context(child(f"worker {name}", *command)))
        for worker in workers:  # all drain at the same time
            stack.callback(worker.ask_to_stop)
        yield servers, workers


@contextmanager
def server_processes(
    state: FleetHome, options: Sequence[str] = (), broker: str = EMBEDDED
) -> Iterator[list[Child]]:
    """Broker and registry as child processes, ready when the block begins; `options` are the server's."""
    with ExitStack() as stack:
        servers = []
        following = []
        if broker == MOSQUITTO:
            following = ["--no-broker", "--mosquitto", str(state.folder / MOSQUITTO)]
            servers.append(
                stack.enter_context(running(start_mosquitto(state, state.folder / MOSQUITTO)))
            )
        title = "the server" if following else "the broker"
        command = ("fleet.cli", "server", "--home", str(state.folder), *options, *following)
        servers.append(stack.enter_context(child(title, *command)))
        servers[-1].wait_ready()
        yield servers


def worker_folder(state: FleetHome, name: str, *, shares: bool) -> Path:
    """The identity folder of one of our workers; of several that share `open`, the broker tells one alone."""
    identity = state.identity(name, Role.WORKER)
    if identity.config.shared_subscriptions is not shares:
        Identity(
            identity.folder, msgspec.structs.replace(identity.config, shared_subscriptions=shares)
        ).save()
    return identity.folder


def watch(
    servers: list[Child], workers: list[Child], stop: threading.Event, tend: Callable[[], None]
) -> None:
    """Waits until `stop` is set, says which worker has ended meanwhile, and calls `tend` now and then.

    Raises:
        FleetError: the server or its broker has ended, or the last of the workers.
    """
    serving = list(workers)
    while not stop.wait(WATCH_S):
        tend()
        for ended in [
            process for process in (*servers, *serving) if process.process.poll() is not None
        ]:
            line = f"{ended.title} ended with exit status {ended.process.returncode}"
            if ended in servers or len(serving) == 1:
                raise FleetError(f"{line}; see above")
            serving.remove(ended)
            print(
                f"fleet: {line}; {len(serving)} of {len(workers)} workers go on",
                file=sys.stderr,
                flush=True,
            )


def worker_name(number: int) -> str:
    return WORKER.replace("1", str(number))


def resolve_bundle(bundle: Path | None, say: object) -> Path:
    """The bundle that was named, or the default model's, which is fetched and built when it is missing."""
    if bundle is not None:
        return bundle.resolve()
    path: Path = load("onnx_export.default_bundle").default_bundle(say)
    return path
