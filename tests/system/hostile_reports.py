"""A device that floods the server with reports, and the receipts of its neighbour.

``python -m tests.system.hostile_reports [--seconds 20] [--megabytes 16] [--broker mosquitto]`` runs
broker and server as `fleet up` does, with SQLite. One device publishes so many reports as the
options say; another publishes one a second and waits for its receipt. The reports are those of

- `implausible`: 250 sources each, dates from 1970 to 9999, bundles and exits that do not exist;
- `plausible`: all that one report may hold, of every day that is kept.

It prints the longest wait for a receipt in seconds, the growth of the registry and the server's
peak memory, and fails beyond `MAX_RECEIPT_S` or `MAX_GROWTH_BYTES`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from fleet.identity.enrolment import Enrolment
from fleet.identity.identity import Identity
from fleet.protocol import topics
from fleet.protocol.access import Role
from fleet.protocol.report import (
    MAX_REPORT_BYTES,
    GenerationReport,
    Switch,
    decode_receipt,
    encode_report,
)
from fleet.protocol.types import DAY_S
from fleet.server.home import EMBEDDED, MOSQUITTO, FleetConfig, FleetHome
from fleet.server.report_admission import MAX_SOURCES, MAX_SWITCHES
from fleet.server.supervisor import server_processes
from fleet.transport.mqtt import MqttTransport
from tests.brokers import HOST, free_port
from tests.cloud_broker_worker.broker import raw
from tests.fleet.conftest import report

MAX_RECEIPT_S: Final = 2.0
MAX_GROWTH_BYTES: Final = 5_000_000
NEIGHBOUR_PAUSE_S: Final = 1.0
RECEIPT_WAIT_S: Final = 60.0
BUNDLE: Final = "b1"  # of `report`
LATEST: Final = 253_370_000_000.0
"""A day of the year 9998, in seconds since 1970."""

MakeReport = Callable[[int], GenerationReport]


def implausible(number: int) -> GenerationReport:
    """Return a report with the most sources that a message holds, of another year each time."""
    return report(
        f"flood-{number}",
        started_at=number * 86_399_000.0 % LATEST,
        bundle_id=f"invented-{number}",
        tokens=2_000,
        sources={f"exit:{number % 1_000 + i}": 8 for i in range(250)},
    )


def plausible(number: int) -> GenerationReport:
    """Return a report with all that it may hold, of one of the last 90 days."""
    switches = [
        Switch(token=i, mode="standalone", reason=f"reason {number}.{i} " + "x" * 100)
        for i in range(MAX_SWITCHES)
    ]
    return report(
        f"flood-{number}",
        started_at=time.time() - number % 90 * DAY_S,
        bundle_id=BUNDLE,
        tokens=MAX_SOURCES,
        sources={f"exit:{number % 1_000 + i}": 1 for i in range(MAX_SOURCES)},
        switches=tuple(switches),
    )


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The effects of one flood."""

    sent_bytes: int
    num_receipts: int
    longest_receipt_s: float
    growth_bytes: int
    peak_mb: float


class FloodedFleet:
    """A server, the identity of a hostile device, and a neighbour that reports."""

    def __init__(self, folder: Path, broker: str, stack: ExitStack) -> None:
        config = FleetConfig(host=HOST, port=free_port(), bundle=str(folder), service_port=0)
        self._home = FleetHome.create(folder / "state", config)
        devices = {
            folder / name: Enrolment(name=name, role=Role.DEVICE, group=None, targets=())
            for name in ("hostile", "neighbour")
        }
        self._home.enroll_all(devices, self._home.address())
        with self._home.registry() as registry:
            registry.rollouts.add_bundle(BUNDLE, "a model", 1)
        self._server = stack.enter_context(server_processes(self._home, broker=broker))[-1]
        self._hostile = Identity.load(folder / "hostile")
        self._link = stack.enter_context(MqttTransport.connect(Identity.load(folder / "neighbour")))
        self._received = threading.Condition()
        self._stored: set[str] = set()
        self._link.subscribe(topics.device_reported("neighbour"), self._on_receipt)
        self._numbers = itertools.count()
        self.receipt_s()

    def _on_receipt(self, _: str, payload: bytes) -> None:
        with self._received:
            self._stored.update(decode_receipt(payload).stored)
            self._received.notify_all()

    def receipt_s(self) -> float:
        """Report an answer; return the time until its receipt."""
        generation = f"neighbour-{next(self._numbers)}"
        payload = encode_report(report(generation, started_at=time.time()))
        began = time.perf_counter()
        self._link.publish(topics.device_stats("neighbour"), payload, qos=1)
        with self._received:
            assert self._received.wait_for(lambda: generation in self._stored, RECEIPT_WAIT_S)
        return time.perf_counter() - began

    def flood(self, make_report: MakeReport, num_bytes: int, seconds: float) -> Figures:
        """Flood the server, and measure until the end of the flood."""
        before = self._registry_bytes()
        sent_bytes = [0]
        arguments = (make_report, num_bytes, seconds, sent_bytes)
        attack = threading.Thread(target=self._send, args=arguments)
        attack.start()
        receipts = []
        while attack.is_alive():
            receipts.append(self.receipt_s())
            attack.join(NEIGHBOUR_PAUSE_S)
        receipts.append(self.receipt_s())
        return Figures(
            sent_bytes=sent_bytes[0],
            num_receipts=len(receipts),
            longest_receipt_s=round(max(receipts), 3),
            growth_bytes=self._registry_bytes() - before,
            peak_mb=round(self._peak_mb(), 1),
        )

    def _send(
        self, make_report: MakeReport, num_bytes: int, seconds: float, sent_bytes: list[int]
    ) -> None:
        """Send at a steady rate; connect again where the broker ends the connection."""
        topic = topics.device_stats("hostile")
        began = time.monotonic()
        payloads = map(encode_report, map(make_report, itertools.count()))
        while sent_bytes[0] < num_bytes and time.monotonic() < began + 20 * seconds:
            with suppress(OSError), raw.connected(self._hostile) as link:
                while sent_bytes[0] < num_bytes:
                    due = began + sent_bytes[0] / num_bytes * seconds
                    time.sleep(max(0.0, due - time.monotonic()))
                    payload = next(payloads)
                    assert len(payload) <= MAX_REPORT_BYTES
                    link.sendall(raw.publish(topic, payload))
                    sent_bytes[0] += len(payload)

    def _registry_bytes(self) -> int:
        return sum(each.stat().st_size for each in self._home.folder.glob("registry.sqlite*"))

    def _peak_mb(self) -> float:
        status = Path(f"/proc/{self._server.process.pid}/status").read_text(encoding="utf-8")
        (line,) = (each for each in status.splitlines() if each.startswith("VmHWM"))
        return int(line.split()[1]) / 1024


@contextmanager
def flooded_fleet(folder: Path, broker: str = EMBEDDED) -> Iterator[FloodedFleet]:
    """Start broker, server and neighbour."""
    with ExitStack() as stack:
        yield FloodedFleet(folder, broker, stack)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--megabytes", type=float, default=16.0)
    parser.add_argument("--broker", choices=[EMBEDDED, MOSQUITTO], default=EMBEDDED)
    options = parser.parse_args()
    is_within = True
    for make_report in (implausible, plausible):
        with (
            tempfile.TemporaryDirectory() as folder,
            flooded_fleet(Path(folder), options.broker) as fleet,
        ):
            figures = fleet.flood(make_report, int(1e6 * options.megabytes), options.seconds)
        print(json.dumps({"reports": make_report.__name__, **asdict(figures)}), flush=True)
        is_within &= figures.longest_receipt_s <= MAX_RECEIPT_S
        is_within &= figures.growth_bytes <= MAX_GROWTH_BYTES
    raise SystemExit(not is_within)


if __name__ == "__main__":
    main()
