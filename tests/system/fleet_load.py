"""Many devices publish a status and a report a second: everything must be stored in time.

mosquitto and PostgreSQL run on this machine, with the server in a process of its own and the
devices in others, on one event loop each. ``python -m tests.system.fleet_load --devices 1000
--seconds 60`` prints the messages that were published and stored, the time until the last one was
stored, and the CPU seconds of each process. It fails unless all are stored within `--within-s` of
the end and the server has dropped none.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from sqlalchemy import Engine, create_engine, func, select

from benchmarks.postgresql import PostgresqlServer, postgresql_server
from fleet.identity.enrolment import Enrolment
from fleet.identity.identity import Identity
from fleet.protocol import topics
from fleet.protocol.access import Role
from fleet.protocol.report import DeviceStatus, decode_receipt, encode_report, encode_status
from fleet.registry.database import parse_url
from fleet.registry.models import GenerationRecord, StatusRecord
from fleet.server.home import MOSQUITTO, FleetConfig, FleetHome
from fleet.server.supervisor import server_processes
from tests.brokers import HOST, free_port
from tests.cloud_broker_worker.broker import raw
from tests.fleet.conftest import report

DEVICES_A_PROCESS: Final = 250
CONNECT_S: Final = 300.0
KEEP_ALIVE_S: Final = 600
POLL_S: Final = 0.5
RETRY_S: Final = 5.0
WINDOW: Final = 4  # as of a device that had no receipt
PUBLISH: Final = 3
EPOCH: Final = 1


class LoadDevice:
    """A device in packets: it publishes at a steady rate, and keeps a report until its receipt."""

    def __init__(self, folder: Path) -> None:
        self._identity = Identity.load(folder)
        self._kept: dict[str, bytes] = {}  # packets by generation

    async def connect(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(
            HOST,
            self._identity.config.port,
            ssl=self._identity.ssl_context(),
            server_hostname=HOST,
            ssl_handshake_timeout=CONNECT_S,
        )
        self._writer.write(raw.connect(self._identity.name, keep_alive_s=KEEP_ALIVE_S))
        assert await self._reader.readexactly(4) == raw.ACCEPTED
        own = topics.device_reported(self._identity.name)
        self._writer.write(raw.subscribe(own))
        await self._reader.readexactly(5)

    async def publish(self, number: int) -> None:
        """Publish a status, which differs from the one before, and a report."""
        name = self._identity.name
        status = DeviceStatus(online=True, epoch=EPOCH, config_version=number, bundle_id="b1")
        self._writer.write(
            raw.publish(topics.device_status(name), encode_status(status), qos=1, packet_id=1)
        )
        generation = report(f"{name}-{number}", started_at=time.time())
        packet = raw.publish(topics.device_stats(name), encode_report(generation))
        self._kept[generation.generation] = packet
        self._writer.write(packet)
        await self._writer.drain()

    async def send_again(self) -> None:
        """Send the reports without a receipt again, a window of them."""
        for packet in list(self._kept.values())[:WINDOW]:
            self._writer.write(packet)
        await self._writer.drain()

    async def read_receipts(self) -> None:
        """Read what the broker sends, and forget the reports that are stored."""
        while True:
            kind = (await self._reader.readexactly(1))[0] >> 4
            length = shift = 0
            more = True
            while more:
                byte = (await self._reader.readexactly(1))[0]
                length |= (byte & 0x7F) << shift
                shift += 7
                more = bool(byte & 0x80)
            body = await self._reader.readexactly(length)
            if kind == PUBLISH:
                receipt = decode_receipt(body[2 + int.from_bytes(body[:2]) :])
                for generation in receipt.stored:
                    self._kept.pop(generation, None)


async def publish_all(folders: list[Path], num_seconds: int) -> None:
    """Connect, wait for a line on stdin, and publish once a second from each device."""
    devices = [LoadDevice(folder) for folder in folders]
    for device in devices:
        await device.connect()
    readers = [asyncio.create_task(device.read_receipts()) for device in devices]
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    began = time.monotonic()
    for number in range(1, num_seconds + 1):
        for i, device in enumerate(devices):
            due = began + number - 1 + i / len(devices)
            if (pause_s := due - time.monotonic()) > 0:
                await asyncio.sleep(pause_s)
            await device.publish(number)
    print(f"published {time.monotonic() - began:.1f}", flush=True)
    end = asyncio.create_task(asyncio.to_thread(sys.stdin.readline))
    while not end.done():
        await asyncio.wait([end], timeout=RETRY_S)
        for device in devices:
            await device.send_again()
    for reader in readers:
        reader.cancel()


class Load:
    """A broker, a server, a registry, and the identities of the devices."""

    def __init__(self, folder: Path, url: str, num_devices: int, stack: ExitStack) -> None:
        config = FleetConfig(
            host=HOST, port=free_port(), bundle=str(folder), registry=url, service_port=0
        )
        self.home = FleetHome.create(folder / "state", config)
        self.folders = [folder / f"d{i}" for i in range(num_devices)]
        enrolments = {
            each: Enrolment(name=each.name, role=Role.DEVICE, group=None, targets=())
            for each in self.folders
        }
        self.home.enroll_all(enrolments, self.home.address())
        with self.home.registry() as registry:
            registry.rollouts.add_bundle("b1", "a model", 1)
        self.engine: Engine = create_engine(parse_url(url))
        stack.callback(self.engine.dispose)
        self.servers = stack.enter_context(server_processes(self.home, broker=MOSQUITTO))

    def num_reports(self) -> int:
        with self.engine.connect() as database:
            return database.scalar(select(func.count()).select_from(GenerationRecord)) or 0

    def num_statuses(self, number: int) -> int:
        """Return the number of devices whose newest status is stored."""
        newest = select(func.count()).where(StatusRecord.config_version == number)
        with self.engine.connect() as database:
            return database.scalar(newest) or 0


def measure(
    folder: Path,
    database: PostgresqlServer,
    num_devices: int,
    num_seconds: int,
    within_s: float,
) -> bool:
    """Run the load, print the figures, and return whether everything was stored in time."""
    with ExitStack() as stack:
        load = Load(folder, database.create("load"), num_devices, stack)
        publishers = []
        for first in range(0, num_devices, DEVICES_A_PROCESS):
            folders = [str(each) for each in load.folders[first : first + DEVICES_A_PROCESS]]
            command = [sys.executable, "-m", __spec__.name, "--publish", str(num_seconds), *folders]
            publishers.append(
                stack.enter_context(
                    subprocess.Popen(
                        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                    )
                )
            )
        for each in publishers:
            assert each.stdout
            assert each.stdout.readline().strip() == "ready"
        print(f"{num_devices} devices are connected", flush=True)
        pids = processes(load, publishers) | {"postgresql": database.pid}
        cpu = {name: cpu_s(pid) for name, pid in pids.items()}
        for each in publishers:
            assert each.stdin
            each.stdin.write("\n")
            each.stdin.flush()
        for each in publishers:
            assert each.stdout
            print(each.stdout.readline().strip(), flush=True)
        ended = time.monotonic()
        expected = num_devices * num_seconds
        is_stored = False
        while not is_stored and time.monotonic() - ended < within_s:
            time.sleep(POLL_S)
            has_statuses = load.num_statuses(num_seconds) == num_devices
            is_stored = has_statuses and load.num_reports() == expected
        figures = {
            "reports_published": expected,
            "reports_stored": load.num_reports(),
            "newest_statuses_stored": load.num_statuses(num_seconds),
            "seconds_after_the_end": round(time.monotonic() - ended, 1),
            "cpu_s": {name: round(cpu_s(pid) - cpu[name], 1) for name, pid in pids.items()},
            "load_average": os.getloadavg()[0],
        }
        print(json.dumps(figures, indent=2), flush=True)
        for each in publishers:
            each.communicate("\n")
        return is_stored


def processes(load: Load, publishers: list[subprocess.Popen[str]]) -> dict[str, int]:
    names = ("mosquitto", "server")
    servers = {name: each.process.pid for name, each in zip(names, load.servers, strict=True)}
    return servers | {f"devices {i}": each.pid for i, each in enumerate(publishers)}


def cpu_s(pid: int) -> float:
    """Return the CPU time of a process and of its children, as Linux counts it (proc(5))."""
    total = 0
    for each in (pid, *children(pid)):
        fields = Path(f"/proc/{each}/stat").read_text("utf-8").rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])  # utime and stime
    return total / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text("utf-8").split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--within-s", type=float, default=60.0)
    parser.add_argument("--publish", type=int, help=argparse.SUPPRESS)
    parser.add_argument("folders", nargs="*", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.publish:
        asyncio.run(publish_all(options.folders, options.publish))
        return
    with tempfile.TemporaryDirectory() as folder, postgresql_server() as server:
        if not measure(Path(folder), server, options.devices, options.seconds, options.within_s):
            sys.exit("some reports were not stored in time")


if __name__ == "__main__":
    main()
