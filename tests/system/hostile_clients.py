"""Hostile clients of the embedded broker, and the delay of their neighbours.

``python -m tests.system.hostile_clients [--devices 300] [--seconds 10] [--away-s 30]`` prints the
figures of each attack. The broker runs in a process of its own, with every device connected.
"""

from __future__ import annotations

import argparse
import resource
import selectors
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from fleet.identity.identity import Identity
from fleet.protocol import topics
from tests.brokers import HOST, WAIT_S
from tests.cloud_broker_worker.broker import raw
from tests.system.broker_process import BrokerProcess, broker_process

NUM_REPEATED: Final = 53_000  # filters of one packet of 1 MB
EVENTS_PER_S: Final = 200
PROBE_S: Final = 0.01


class Delays(NamedTuple):
    """Round trips of a neighbour in milliseconds."""

    p50: float
    p95: float
    longest: float
    number: int


class Neighbour:
    """A worker and a device that exchange messages."""

    def __init__(self, broker: BrokerProcess, stack: ExitStack) -> None:
        self._device = stack.enter_context(raw.connected(broker.identity("d0")))
        self._worker = stack.enter_context(raw.connected(broker.identity("w1")))
        self._device.sendall(raw.subscribe("ce/v1/d/d0/s/+"))
        assert raw.receive(self._device, 5)[-1] == 0

    def round_trip_s(self) -> float:
        """The time from a worker's message to its arrival at the device."""
        message = raw.publish(topics.to_device("d0", "s1"), b"token")
        began = time.perf_counter()
        self._worker.sendall(message)
        assert raw.receive(self._device, len(message)) == message
        return time.perf_counter() - began

    def delays(self, attack: threading.Thread) -> Delays:
        """Measure until the attack has ended."""
        times_ms = []
        attack.start()
        while attack.is_alive():
            times_ms.append(1000 * self.round_trip_s())
            time.sleep(PROBE_S)
        times_ms.sort()
        return Delays(
            p50=times_ms[len(times_ms) // 2],
            p95=times_ms[int(len(times_ms) * 0.95)],
            longest=times_ms[-1],
            number=len(times_ms),
        )


@contextmanager
def connected_devices(broker: BrokerProcess, *, have_triggers: bool = False) -> Iterator[int]:
    """Connect every device but d0 and d1 with the subscriptions of an agent; yield their number."""
    with ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        for i in range(2, broker.num_devices):
            device = stack.enter_context(raw.connected(broker.identity(f"d{i}")))
            _subscribe_as_device(device, f"d{i}", have_triggers)
            device.setblocking(False)
            selector.register(device, selectors.EVENT_READ)
        has_ended = threading.Event()
        reader = threading.Thread(target=_read_all, args=(selector, has_ended))
        reader.start()
        try:
            yield broker.num_devices - 2
        finally:
            has_ended.set()
            reader.join()


def _subscribe_as_device(device: ssl.SSLSocket, name: str, have_triggers: bool) -> None:
    filters = [
        topics.device_config(name),
        topics.prompts_to(name),
        topics.cancels_to(name),
        topics.sessions_of_device(name),
        topics.device_reported(name),
        topics.WORKER_STATUS_FILTER,
    ]
    filters += [topics.app_event("a1", "+")] if have_triggers else []
    for topic_filter in filters:
        device.sendall(raw.subscribe(topic_filter))
        assert raw.receive(device, 5)[-1] == 0


def _read_all(selector: selectors.BaseSelector, has_ended: threading.Event) -> None:
    while not has_ended.is_set():
        for key, _ in selector.select(0.05):
            with suppress(ssl.SSLWantReadError):
                while key.fileobj.recv(65_536):  # type: ignore[union-attr]
                    pass


def repeat_filters(broker: BrokerProcess, num_filters: int, seconds: float) -> None:
    """Send one granted filter many times in one packet, again and again."""
    topic_filter = topics.to_device("d1", "+")
    end = time.monotonic() + seconds
    packet = raw.subscribe_all([topic_filter] * num_filters)
    while time.monotonic() < end:
        with suppress(OSError), raw.connected(broker.identity("d1")) as attacker:
            while time.monotonic() < end:
                attacker.sendall(packet)
                if len(raw.receive(attacker, 4 + num_filters)) < num_filters:
                    break


def flood_events(broker: BrokerProcess, seconds: float, events_per_s: float) -> None:
    """Publish small events, each on a new topic."""
    with raw.connected(broker.identity("a1")) as attacker:
        began = time.monotonic()
        for i in range(int(seconds * events_per_s)):
            time.sleep(max(0.0, began + i / events_per_s - time.monotonic()))
            attacker.sendall(raw.publish(topics.app_event("a1", f"c{i}"), b"1"))


def admitted_next_to_silent(broker: BrokerProcess, num_silent: int, num_clients: int) -> int:
    """Return how many of `num_clients` are admitted while others only open connections."""
    with ExitStack() as stack:
        for _ in range(num_silent):
            sock = stack.enter_context(socket.socket())
            sock.settimeout(WAIT_S)
            sock.connect((HOST, broker.port))
        return sum(_is_admitted(broker.identity(f"d{i}")) for i in range(num_clients))


def lost_while_registry_away(broker: BrokerProcess, num_clients: int, away_s: float) -> int:
    """Return how many connected clients have lost their connection, or cannot come back."""
    with ExitStack() as stack:
        identities = [broker.identity(f"d{i}") for i in range(num_clients)]
        clients = [stack.enter_context(raw.connected(each)) for each in identities]
        time.sleep(2.0)  # the broker has read the rights of all
        with broker.registry_away():
            time.sleep(away_s)
            num_lost = sum(not _responds(client) for client in clients)
            return num_lost + sum(not _is_admitted(each) for each in identities)


def _is_admitted(identity: Identity) -> bool:
    with suppress(OSError, AssertionError), raw.connected(identity):
        return True
    return False


def _responds(client: ssl.SSLSocket) -> bool:
    with suppress(OSError):
        client.sendall(raw.PINGREQ)
        return raw.receive(client, 2) == raw.PINGRESP
    return False


def attack(
    broker: BrokerProcess, function: Callable[..., None], *arguments: float
) -> tuple[Delays, float]:
    """Run an attack on a thread; return a neighbour's delays and the broker's CPU seconds."""
    with ExitStack() as stack:
        neighbour = Neighbour(broker, stack)
        cpu_s = broker.cpu_s()
        thread = threading.Thread(target=function, args=(broker, *arguments))
        delays = neighbour.delays(thread)
        return delays, broker.cpu_s() - cpu_s


def _report(title: str, figures: tuple[Delays, float]) -> None:
    delays, cpu_s = figures
    print(
        f"{title:58} p50 {delays.p50:7.1f} ms  p95 {delays.p95:7.1f} ms  "
        f"longest {delays.longest:7.1f} ms  {cpu_s:6.1f} s of CPU",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--away-s", type=float, default=30.0)
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    seconds = options.seconds
    with (
        tempfile.TemporaryDirectory() as folder,
        broker_process(Path(folder), options.devices) as broker,
    ):
        began = time.monotonic()
        with connected_devices(broker) as number:
            print(f"{number} devices connected one by one in {time.monotonic() - began:.1f} s")
            print(f"memory {broker.peak_mb():.0f} MB, CPU {broker.cpu_s():.1f} s")
            _report("no attack", attack(broker, lambda _broker: time.sleep(seconds)))
            for count in (1_000, NUM_REPEATED):
                title = f"one filter {count} times in a packet"
                _report(title, attack(broker, repeat_filters, count, seconds))
            title = f"{EVENTS_PER_S} events a second on new topics"
            _report(title, attack(broker, flood_events, seconds, EVENTS_PER_S))
            _report("events without a pause", attack(broker, flood_events, seconds, 5_000))
        with connected_devices(broker, have_triggers=True) as number:
            title = f"{EVENTS_PER_S} events a second, received by {number} devices"
            _report(title, attack(broker, flood_events, seconds, EVENTS_PER_S))
        num_clients = min(71, options.devices)
        admitted = admitted_next_to_silent(broker, 1_500, num_clients)
        print(f"next to 1500 silent connections {admitted} of {num_clients} clients are admitted")
        num_clients = min(50, options.devices)
        lost = lost_while_registry_away(broker, num_clients, options.away_s)
        print(f"registry away for {options.away_s:g} s: {lost} of {num_clients} clients lost")
        print(f"peak memory {broker.peak_mb():.0f} MB")


if __name__ == "__main__":
    main()
