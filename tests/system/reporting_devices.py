"""Many devices in one process that only report.

``python -m tests.system.reporting_devices FOLDER ...``: each device has its own connection, outbox
on disk and `Reporter`. The process prints ``ready`` when all are connected. Each line on stdin is
then a number of reports that every device makes; the end of stdin ends the process.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from edge_agent.reporting.report_outbox import REPORTS_FILE, ReportOutbox
from edge_agent.reporting.reporter import Reporter
from fleet.identity.identity import Identity
from fleet.protocol import topics
from fleet.protocol.report import DeviceStatus, encode_status
from fleet.transport.mqtt import MqttTransport
from tests.fleet.conftest import report

RETRY_S: Final = 2.0, 8.0
REPORTS_A_SESSION: Final = 8


class ReportingDevice:
    """One device of the identity folder `folder`; its reports are ``<name>-1``, ``<name>-2``."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._identity = Identity.load(folder)
        self._link = stack.enter_context(MqttTransport.connect(self._identity, timeout_s=60))
        outbox = ReportOutbox(folder / REPORTS_FILE, limit=10_000)
        self._reporter = stack.enter_context(Reporter(self._link, outbox, RETRY_S))
        self._link.on_up(self._announce)
        self._num_reports = 0

    def report(self, count: int) -> None:
        for _ in range(count):
            session = f"s{self._num_reports // REPORTS_A_SESSION}"
            self._num_reports += 1
            generation = f"{self._identity.name}-{self._num_reports}"
            self._reporter.add(report(generation, session=session, started_at=time.time()))

    def _announce(self) -> None:
        birth = encode_status(DeviceStatus(online=True, epoch=1))
        self._link.publish(topics.device_status(self._identity.name), birth, qos=1, retain=True)


def main() -> None:
    with ExitStack() as stack:
        devices = [ReportingDevice(Path(folder), stack) for folder in sys.argv[1:]]
        print("ready", flush=True)
        for line in sys.stdin:
            for device in devices:
                device.report(int(line))


if __name__ == "__main__":
    main()
