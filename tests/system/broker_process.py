"""The embedded broker in a process of its own, with a fleet by number and no registry.

``python -m tests.system.broker_process FOLDER PORT DEVICES`` serves until its stdin ends. The
registry is away while the file ``away`` is in the folder.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from cloud_broker_worker.broker.embedded import EmbeddedBroker
from fleet.errors import RegistryError
from fleet.identity.identity import Identity
from fleet.protocol.access import Grants, Role
from provisioning.authority import CertificateAuthority
from tests.brokers import HOST, free_port, listens, wait_until
from tests.identities import issue_identity

APPS: Final = ("a1", "a2")


def fleet_of(num_devices: int) -> dict[str, Grants]:
    """Return the rights of two apps, which may prompt all devices, of a worker and of a server."""
    devices = tuple(f"d{i}" for i in range(num_devices))
    grants = [Grants(Role.DEVICE, name, APPS) for name in devices]
    grants += [Grants(Role.APP, name, devices) for name in APPS]
    grants += [Grants(Role.WORKER, "w1"), Grants(Role.SERVER, "s1")]
    return {each.name: each for each in grants}


class NumberedRegistry:
    """A registry that knows every certificate of the fleet, and may be away."""

    def __init__(self, num_devices: int, away: Path) -> None:
        self._grants = fleet_of(num_devices)
        self._away = away
        self.audit_log = self
        self.identities = self

    def newest_change(self) -> int:
        if self._away.exists():
            raise RegistryError("the registry is away")
        return time.monotonic_ns()  # everything is read again, the most expensive case

    def admitted_holders(self, holders: Sequence[tuple[str, str]]) -> list[Grants | None]:
        self.newest_change()
        return [self._grants.get(name) for name, _ in holders]


class BrokerProcess:
    """The process, and identities of its fleet."""

    def __init__(self, folder: Path, num_devices: int, process: subprocess.Popen[bytes]) -> None:
        self.num_devices = num_devices
        self.process = process
        self.port = int(process.args[-2])  # type: ignore[index,arg-type]
        self._folder = folder
        self._roles = {name: grants.role for name, grants in fleet_of(num_devices).items()}
        self._authority = CertificateAuthority.load(folder / "ca")

    def identity(self, name: str) -> Identity:
        folder = self._folder / "identities" / name
        if folder.exists():
            return Identity.load(folder)
        role = self._roles[name]
        return issue_identity(self._authority, name, role, folder, host=HOST, port=self.port)

    @contextmanager
    def registry_away(self) -> Iterator[None]:
        away = self._folder / "away"
        away.touch()
        yield
        away.unlink()

    def cpu_s(self) -> float:
        """CPU seconds of the process until now."""
        fields = self._proc("stat").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100.0

    def peak_mb(self) -> float:
        """The most memory that the process has had."""
        (line,) = (each for each in self._proc("status").splitlines() if each.startswith("VmHWM"))
        return int(line.split()[1]) / 1024

    def _proc(self, name: str) -> str:
        return Path(f"/proc/{self.process.pid}/{name}").read_text(encoding="utf-8")


@contextmanager
def broker_process(folder: Path, num_devices: int) -> Iterator[BrokerProcess]:
    """Start the broker; it listens within the block."""
    CertificateAuthority.create(folder / "ca")
    port = free_port()
    command = [sys.executable, "-m", __name__, str(folder), str(port), str(num_devices)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            wait_until(lambda: listens(port), "the broker listens")
            yield BrokerProcess(folder, num_devices, process)
        finally:
            assert process.stdin
            process.stdin.close()


def main() -> None:
    folder = Path(sys.argv[1])
    port = int(sys.argv[2])
    tls = CertificateAuthority.load(folder / "ca").server_tls(folder / "server", HOST)
    registry = NumberedRegistry(int(sys.argv[3]), folder / "away")
    with EmbeddedBroker(HOST, port, tls, registry):
        sys.stdin.read()


if __name__ == "__main__":
    main()
