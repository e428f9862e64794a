"""The processes of `fleet up`: the server, a mosquitto next to it, and workers."""

from __future__ import annotations

import errno
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from cloud_broker_worker.broker.mosquitto import find_mosquitto
from fleet.bundles.manifest import read_manifest
from fleet.errors import ConfigError, FleetError
from fleet.identity.identity import Identity
from fleet.protocol.access import Role
from fleet.server.child_process import DRAIN_TIMEOUT_S, Child, child, running
from fleet.server.home import EMBEDDED, MOSQUITTO, WORKER, FleetConfig, FleetHome
from fleet.server.mosquitto import start_mosquitto
from fleet.server.worker_settings import WorkerSettings
from fleet.utils.host_address import bind_probe, host_port
from fleet.utils.optional_imports import require
from fleet.utils.paths import absolute_path
from onnx_export.default_bundle import default_bundle

WATCH_S: Final = 0.2
MAX_PORT: Final = 65535
DEFAULT_SETTINGS: Final = WorkerSettings()


class FleetProcesses(NamedTuple):
    """Child processes: the server and its broker, and the workers."""

    servers: list[Child]
    workers: list[Child]


def check_broker(broker: str) -> None:
    """Raise ConfigError when `fleet up` cannot start a broker of this kind."""
    if broker not in (EMBEDDED, MOSQUITTO):
        raise ConfigError(f"--broker {broker}: expected {EMBEDDED} or {MOSQUITTO}")
    if broker == MOSQUITTO:
        find_mosquitto()


def check_port(host: str, port: int, option: str = "--port") -> None:
    """Raise ConfigError, which names the `option` for another port, when the port is in use."""
    try:
        bind_probe(host, port).close()
    except OSError as error:
        advice = "check the host's name and this machine's addresses"
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            advice = f"stop what uses it or choose another with {option}"
        raise ConfigError(
            f"cannot listen on {host_port(host, port)}: {error.strerror}; {advice}"
        ) from None


def check_ports(config: FleetConfig, listen: str | None = None) -> None:
    """Raise ConfigError when the port of the broker or of the service is in use."""
    host = listen or config.host
    check_port(host, config.port)
    if config.service_port:
        check_port(host, config.service_port, "--service-port")


def check_metrics_ports(config: FleetConfig, metrics_port: int | None, num_workers: int) -> None:
    """Raise ConfigError when a port of the server's or a worker's metrics is impossible or used.

    With 0 the system chooses the ports.
    """
    if not metrics_port:
        return
    last = metrics_port + num_workers
    for port, option in ((config.port, "--port"), (config.service_port, "--service-port")):
        if metrics_port <= port <= last:
            raise ConfigError(
                f"--metrics-port {metrics_port}: metrics need the ports {metrics_port} to {last}, "
                f"and {option} has {port}; give one of them another"
            )
    if last > MAX_PORT:
        raise ConfigError(
            f"--metrics-port {metrics_port}: metrics need the ports {metrics_port} to {last}, and "
            f"{MAX_PORT} is the last one; give a smaller number"
        )


@contextmanager
def fleet_processes(
    home: FleetHome,
    num_workers: int = 1,
    metrics_port: int | None = None,
    broker: str = EMBEDDED,
    listen: str | None = None,
    settings: WorkerSettings = DEFAULT_SETTINGS,
    server_options: Sequence[str] = (),
) -> Iterator[FleetProcesses]:
    """Run server and workers; the server is ready and the workers start when the block begins.

    The embedded broker is in the server's process; mosquitto is a process of its own. With a
    `metrics_port` the server serves its metrics there, and the workers on the ports that follow.
    Broker and service listen on the address `listen`, by default on the fleet's host. There are no
    workers if the devices of the fleet's bundle hold the whole model. `server_options` are further
    options of the server's command line.
    """
    check_ports(home.config, listen)
    require("worker", "torch", "transformers")
    shares = broker == MOSQUITTO
    bundle = Path(home.config.bundle)
    options = []
    if read_manifest(bundle).is_device_only:
        num_workers = 0
    else:
        options = worker_options(settings, bundle, num_workers)
    with ExitStack() as stack:
        # Enrol each worker before a broker starts, whose first files then have the worker's rights.
        names = [worker_name(number) for number in range(1, num_workers + 1)]
        folders = [worker_folder(home, name, shares=shares) for name in names]
        all_options = [*_metrics_options(metrics_port, 0), *server_options]
        servers = stack.enter_context(server_processes(home, all_options, broker, listen))
        workers = []
        for number, folder in enumerate(folders, start=1):
            metrics = _metrics_options(metrics_port, number)
            command = ("cloud_broker_worker", "run", str(folder), *options, *metrics)
            workers.append(stack.enter_context(child(f"worker {worker_name(number)}", *command)))
        for worker in workers:  # all drain at the same time
            stack.callback(worker.request_stop)
        yield FleetProcesses(servers, workers)


def worker_options(settings: WorkerSettings, bundle: Path, num_workers: int) -> list[str]:
    """The options of one of `num_workers` workers on this machine."""
    own = ["--drain-timeout", str(DRAIN_TIMEOUT_S)]
    own.append("--no-renew")  # the server renews the fleet's own identities
    return [*settings.arguments(bundle, num_workers), *own]


def _metrics_options(first_port: int | None, number: int) -> list[str]:
    if first_port is None:
        return []
    return ["--metrics-port", str(first_port + number if first_port else 0)]


@contextmanager
def server_processes(
    home: FleetHome,
    options: Sequence[str] = (),
    broker: str = EMBEDDED,
    listen: str | None = None,
) -> Iterator[list[Child]]:
    """Run broker and server, ready when the block begins; `options` are the server's."""
    title = "the broker"
    command = ["fleet.cli", "server", "--home", str(home.folder), *options]
    if listen:
        command += ["--listen", listen]
    with ExitStack() as stack:
        servers = []
        if broker == MOSQUITTO:
            folder = home.folder / MOSQUITTO
            servers.append(stack.enter_context(running(start_mosquitto(home, folder, listen))))
            title = "the server"
            command += ["--no-broker", "--mosquitto", str(folder)]
        server = stack.enter_context(child(title, *command))
        server.wait_ready()
        yield [*servers, server]


def worker_folder(home: FleetHome, name: str, *, shares: bool) -> Path:
    """The identity folder of one of our workers; with `shares` it uses shared subscriptions."""
    identity = home.identity(name, Role.WORKER)
    if identity.config.shared_subscriptions is not shares:
        config = msgspec.structs.replace(identity.config, shared_subscriptions=shares)
        Identity(identity.folder, config).save()
    return identity.folder


def watch_processes(
    processes: FleetProcesses, stop: threading.Event, step: Callable[[], None]
) -> None:
    """Wait until `stop` is set; report each worker that ends; call `step` several times a second.

    Raises:
        FleetError: the server, its broker, or the last of the workers has ended.
    """
    workers = list(processes.workers)
    while not stop.wait(WATCH_S):
        step()
        for ended in [each for each in (*processes.servers, *workers) if _has_ended(each)]:
            line = f"{ended.title} ended with exit status {ended.process.returncode}"
            if ended in processes.servers or len(workers) == 1:
                raise FleetError(f"{line}; see above")
            workers.remove(ended)
            report(f"{line}; {len(workers)} of {len(processes.workers)} workers continue")


def _has_ended(process: Child) -> bool:
    return process.process.poll() is not None


def report(line: str) -> None:
    """Print a line about a child process on stderr."""
    print(f"fleet: {line}", file=sys.stderr, flush=True)


def worker_name(number: int) -> str:
    """The name of one of our workers, from 1 on."""
    return WORKER.replace("1", str(number))


def resolve_bundle(bundle: Path | None, progress: Callable[[str], None]) -> Path:
    """The given bundle, or the default model's, which is downloaded and built if it is missing."""
    return absolute_path(bundle) if bundle is not None else default_bundle(progress)
