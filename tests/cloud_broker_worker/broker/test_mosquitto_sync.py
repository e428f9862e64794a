"""A mosquitto that follows the registry: its files, reloads and evictions."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cloud_broker_worker.broker.mosquitto import find_mosquitto
from cloud_broker_worker.broker.mosquitto_reload import reload_by_command, reload_by_signal
from cloud_broker_worker.broker.mosquitto_sync import (
    MAX_EVICTIONS,
    RECHECK_S,
    SECOND_EVICTION_S,
    MosquittoSync,
)
from fleet.errors import ConfigError, LinkError
from fleet.protocol.access import Role
from fleet.registry.store import Registry
from provisioning.authority import CertificateAuthority
from provisioning.crl import CrlFile
from tests.identities import enroll_identity


@dataclass(frozen=True)
class Spent:
    serial: str
    name: str
    revoked_at: float | None = 0.0


class SyncBench:
    """A `MosquittoSync` on a real registry and list. `broken` makes reloads or evictions fail."""

    def __init__(self, folder: Path, registry: Registry) -> None:
        self.registry = registry
        self.authority = CertificateAuthority.create(folder / "ca")
        self.folder = folder
        self.reloads = 0
        self.evicted: list[str] = []
        self.broken: type[Exception] | None = None
        self.now = time.time()
        crl = CrlFile(folder / "crl.pem", self.authority)
        self.task = MosquittoSync(
            folder, registry, crl=crl, reload=self._reload, evictor=self, clock=lambda: self.now
        )

    def _reload(self) -> None:
        if self.broken is ConfigError:
            raise ConfigError("no process")
        self.reloads += 1

    def evict(self, name: str) -> None:
        if self.broken is LinkError:
            raise LinkError("no broker")
        self.evicted.append(name)

    def spent(self, now: float) -> list[Spent]:
        return [Spent(f"{number:x}", name) for number, name in enumerate(self.evicted, start=1)]

    def enroll(self, name: str) -> None:
        enroll_identity(
            self.registry,
            self.authority,
            name,
            Role.DEVICE,
            self.folder / name,
            host="localhost",
            port=8883,
        )

    def sync(self) -> int:
        """Synchronise; return the number of reloads."""
        before = self.reloads
        self.task.sync()
        return self.reloads - before


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[SyncBench]:
    with Registry.open(tmp_path / "registry.sqlite") as registry:
        new = SyncBench(tmp_path, registry)
        new.enroll("d1")
        new.sync()
        yield new


def test_rights_follow_enrolments(bench: SyncBench) -> None:
    bench.enroll("d2")
    assert bench.sync() == 1
    assert "user d2\n" in (bench.folder / "acl").read_text()
    assert (bench.folder / "acl").stat().st_mode & 0o777 == 0o600


def test_without_a_change_no_file_is_written_and_no_broker_reloaded(bench: SyncBench) -> None:
    before = (
        (bench.folder / "acl").stat().st_mtime_ns,
        (bench.folder / "crl.pem").stat().st_mtime_ns,
    )
    bench.now += RECHECK_S
    assert bench.sync() == 0
    assert before == (
        (bench.folder / "acl").stat().st_mtime_ns,
        (bench.folder / "crl.pem").stat().st_mtime_ns,
    )


def test_a_revoked_name_loses_its_rights_and_its_session(bench: SyncBench) -> None:
    bench.registry.identities.revoke("d1")
    bench.sync()
    assert bench.evicted == ["d1"]
    assert "user d1\n" not in (bench.folder / "acl").read_text()


def test_a_revoked_device_loses_its_session_although_the_rights_could_not_be_written_at_first(
    bench: SyncBench,
) -> None:
    bench.registry.identities.revoke("d1")
    (bench.folder / "acl").unlink()
    (bench.folder / "acl").mkdir()
    with pytest.raises(ConfigError, match="cannot write"):
        bench.sync()
    assert (bench.evicted, bench.reloads) == ([], 1)
    (bench.folder / "acl").rmdir()
    assert bench.sync() == 2
    assert bench.evicted == ["d1"]


def test_the_certificate_of_an_eviction_is_on_the_list_afterwards(bench: SyncBench) -> None:
    bench.registry.identities.revoke("d1")
    assert bench.sync() == 2
    assert bench.sync() == 0


def test_a_session_is_ended_again_after_the_broker_has_ended_silent_connections(
    bench: SyncBench,
) -> None:
    bench.registry.identities.revoke("d1")
    bench.sync()
    bench.now += SECOND_EVICTION_S - 1
    bench.sync()
    assert bench.evicted == ["d1"]
    bench.now += 1
    bench.sync()
    assert bench.evicted == ["d1", "d1"]


def test_many_revoked_at_once_are_evicted_in_several_rounds(bench: SyncBench) -> None:
    names = [f"n{i:02}" for i in range(MAX_EVICTIONS + 1)]
    for name in names:
        bench.enroll(name)
    bench.sync()
    for name in names:
        bench.registry.identities.revoke(name)
    bench.sync()
    assert len(bench.evicted) == MAX_EVICTIONS
    bench.sync()
    assert sorted(bench.evicted) == names


def test_an_expired_certificate_loses_its_rights_within_a_minute(bench: SyncBench) -> None:
    bench.registry.identities.add_identity(
        "d2", Role.DEVICE, fingerprint="d2", not_after=time.time() + 1
    )
    bench.sync()
    assert "user d2\n" in (bench.folder / "acl").read_text()
    time.sleep(1)
    bench.now += RECHECK_S
    assert bench.sync() == 1
    assert "user d2\n" not in (bench.folder / "acl").read_text()


def test_a_broker_that_could_not_be_reloaded_is_reloaded_later(bench: SyncBench) -> None:
    bench.enroll("d2")
    bench.broken = ConfigError
    with pytest.raises(ConfigError):
        bench.task.sync()
    bench.broken = None
    assert bench.sync() == 1


def test_a_reload_that_failed_before_a_restart_is_repeated_after_it(bench: SyncBench) -> None:
    bench.registry.identities.revoke("d1")
    bench.broken = ConfigError
    with pytest.raises(ConfigError):
        bench.task.sync()
    bench.broken = None
    bench.task = MosquittoSync(
        bench.folder,
        bench.registry,
        crl=CrlFile(bench.folder / "crl.pem", bench.authority),
        reload=bench._reload,
        evictor=bench,
        clock=lambda: bench.now,
    )
    bench.sync()
    assert bench.reloads == 3, "at first, now, and for the certificate that ended the session"
    assert bench.evicted == ["d1"]


def test_a_session_that_could_not_be_ended_is_ended_later(bench: SyncBench) -> None:
    bench.registry.identities.revoke("d1")
    bench.broken = LinkError
    with pytest.raises(LinkError):
        bench.task.sync()
    bench.broken = None
    bench.sync()
    assert bench.evicted == ["d1"]


def test_a_mosquitto_that_does_not_run_is_named_by_its_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mosquitto\.pid.*--reload"):
        reload_by_signal(tmp_path / "mosquitto.pid")()


def test_a_command_that_fails_is_named(tmp_path: Path) -> None:
    reload_by_command(f"touch {tmp_path / 'reloaded'}")()
    assert (tmp_path / "reloaded").exists()
    with pytest.raises(ConfigError, match="correct --reload"):
        reload_by_command("false")()
    with pytest.raises(ConfigError, match="no-such-program"):
        reload_by_command("no-such-program --now")()


def test_a_mosquitto_that_is_not_installed_comes_with_the_line_that_installs_it(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match="apt-get install mosquitto"):
        find_mosquitto(str(tmp_path))


def test_a_process_that_does_not_handle_the_signal_yet_is_not_ended_by_it(tmp_path: Path) -> None:
    pid_file = tmp_path / "mosquitto.pid"
    with subprocess.Popen(["sleep", "60"]) as starting:
        pid_file.write_text(f"{starting.pid}\n", encoding="utf-8")
        try:
            with pytest.raises(ConfigError, match="is still starting"):
                reload_by_signal(pid_file)()
            assert starting.poll() is None
        finally:
            starting.kill()
