"""A mosquitto's files follow the registry: what is written when, who is told, and whose session is ended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cloud_broker_worker.broker.mosquitto import find_mosquitto
from cloud_broker_worker.broker.mosquitto_reload import by_command, by_signal
from cloud_broker_worker.broker.mosquitto_sync import (
    HELD_S,
    MAX_EVICTIONS,
    RECHECK_S,
    MosquittoSync,
)
from fleet.errors import ConfigError, LinkError
from fleet.protocol.access import Role
from fleet.registry.store import Registry
from provisioning.authority import CertificateAuthority
from provisioning.crl import CrlFile
from provisioning.offline_enrolment import enroll


@dataclass(frozen=True)
class Spent:
    serial: str
    name: str
    revoked_at: float | None = 0.0


class Kept:
    """A keeper over a real registry and list; what it tells the broker is written down. `broken` makes that fail."""

    def __init__(self, folder: Path, registry: Registry) -> None:
        self.registry = registry
        self.authority = CertificateAuthority.create(folder / "ca")
        self.folder = folder
        self.reloads = 0
        self.evicted: list[str] = []
        self.broken: type[Exception] | None = None
        self.now = time.time()
        crl = CrlFile(folder / "crl.pem", self.authority)
        self.keeper = MosquittoSync(
            folder, registry, crl=crl, reload=self._reload, evictions=self, clock=lambda: self.now
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
        enroll(
            self.registry,
            self.authority,
            name,
            Role.DEVICE,
            self.folder / name,
            host="localhost",
            port=8883,
        )

    def sync(self) -> int:
        """How often the broker was told."""
        before = self.reloads
        self.keeper.sync()
        return self.reloads - before


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    with Registry.open(tmp_path / "registry.sqlite") as registry:
        made = Kept(tmp_path, registry)
        made.enroll("d1")
        made.sync()
        yield made


def test_rights_follow_who_is_enrolled(kept: Kept) -> None:
    kept.enroll("d2")
    assert kept.sync() == 1
    assert "user d2\n" in (kept.folder / "acl").read_text()
    assert (kept.folder / "acl").stat().st_mode & 0o777 == 0o600


def test_without_a_change_nothing_is_written_and_nobody_told(kept: Kept) -> None:
    before = (kept.folder / "acl").stat().st_mtime_ns, (kept.folder / "crl.pem").stat().st_mtime_ns
    kept.now += RECHECK_S
    assert kept.sync() == 0
    assert before == (
        (kept.folder / "acl").stat().st_mtime_ns,
        (kept.folder / "crl.pem").stat().st_mtime_ns,
    )


def test_a_revoked_name_loses_its_rights_and_its_session(kept: Kept) -> None:
    kept.registry.revoke("d1")
    kept.sync()
    assert kept.evicted == ["d1"]
    assert "user d1\n" not in (kept.folder / "acl").read_text()


def test_who_was_revoked_loses_the_session_though_the_rights_could_not_be_written_at_first(
    kept: Kept,
) -> None:
    kept.registry.revoke("d1")
    (kept.folder / "acl").unlink()
    (kept.folder / "acl").mkdir()
    with pytest.raises(ConfigError, match="cannot write"):
        kept.sync()
    assert (kept.evicted, kept.reloads) == ([], 1)
    (kept.folder / "acl").rmdir()
    assert kept.sync() == 2
    assert kept.evicted == ["d1"]


def test_the_certificate_of_an_eviction_is_on_the_list_afterwards(kept: Kept) -> None:
    kept.registry.revoke("d1")
    assert kept.sync() == 2
    assert kept.sync() == 0


def test_a_session_is_ended_once_more_when_nobody_can_be_left_who_was_let_in_and_silent(
    kept: Kept,
) -> None:
    kept.registry.revoke("d1")
    kept.sync()
    kept.now += HELD_S - 1
    kept.sync()
    assert kept.evicted == ["d1"]
    kept.now += 1
    kept.sync()
    assert kept.evicted == ["d1", "d1"]


def test_of_many_revoked_at_once_some_are_put_out_in_each_round(kept: Kept) -> None:
    names = [f"n{i:02}" for i in range(MAX_EVICTIONS + 1)]
    for name in names:
        kept.enroll(name)
    kept.sync()
    for name in names:
        kept.registry.revoke(name)
    kept.sync()
    assert len(kept.evicted) == MAX_EVICTIONS
    kept.sync()
    assert sorted(kept.evicted) == names


def test_a_certificate_that_ends_takes_its_rights_along_within_a_minute(kept: Kept) -> None:
    kept.registry.add_identity("d2", Role.DEVICE, fingerprint="d2", not_after=time.time() + 1)
    kept.sync()
    assert "user d2\n" in (kept.folder / "acl").read_text()
    time.sleep(1)
    kept.now += RECHECK_S
    assert kept.sync() == 1
    assert "user d2\n" not in (kept.folder / "acl").read_text()


def test_a_broker_that_could_not_be_told_is_told_later(kept: Kept) -> None:
    kept.enroll("d2")
    kept.broken = ConfigError
    with pytest.raises(ConfigError):
        kept.keeper.sync()
    kept.broken = None
    assert kept.sync() == 1


def test_what_the_broker_was_not_told_before_a_restart_it_is_told_then(kept: Kept) -> None:
    kept.registry.revoke("d1")
    kept.broken = ConfigError
    with pytest.raises(ConfigError):
        kept.keeper.sync()
    kept.broken = None
    kept.keeper = MosquittoSync(
        kept.folder, kept.registry, crl=CrlFile(kept.folder / "crl.pem", kept.authority), reload=kept._reload, evictions=kept,
        clock=lambda: kept.now,
    )  # fmt: skip
    kept.sync()
    assert kept.reloads == 3, "at first, now, and for the certificate that ended the session"
    assert kept.evicted == ["d1"]


def test_a_session_that_could_not_be_ended_is_ended_later(kept: Kept) -> None:
    kept.registry.revoke("d1")
    kept.broken = LinkError
    with pytest.raises(LinkError):
        kept.keeper.sync()
    kept.broken = None
    kept.sync()
    assert kept.evicted == ["d1"]


def test_a_mosquitto_that_does_not_run_is_named_by_its_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mosquitto\.pid.*--reload"):
        by_signal(tmp_path / "mosquitto.pid")()


def test_a_command_that_fails_is_named(tmp_path: Path) -> None:
    by_command(f"touch {tmp_path / 'told'}")()
    assert (tmp_path / "told").exists()
    with pytest.raises(ConfigError, match="correct --reload"):
        by_command("false")()
    with pytest.raises(ConfigError, match="no-such-program"):
        by_command("no-such-program --now")()


def test_a_mosquitto_that_is_not_installed_comes_with_the_line_that_installs_it(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match="apt-get install mosquitto"):
        find_mosquitto(str(tmp_path))
