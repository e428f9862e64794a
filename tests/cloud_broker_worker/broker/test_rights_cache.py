"""The cache of rights, the rules of a mosquitto, and the rights of one identity."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_broker_worker.broker import rights_cache
from cloud_broker_worker.broker.mosquitto import acl_rules, write_config
from cloud_broker_worker.broker.rights_cache import (
    HOLD_S,
    RECHECK_S,
    CertificateHolder,
    RightsCache,
)
from fleet.errors import ConfigError, RegistryError
from fleet.identity.identity import ServerTls
from fleet.protocol.access import Action, Grants, Role
from fleet.protocol.topics import matches

DEVICE = Grants(Role.DEVICE, "d1")
HOLDER = CertificateHolder("d1", "a" * 64)
TLS = ServerTls(Path("/tls/ca.pem"), Path("/tls/cert.pem"), Path("/tls/key.pem"))
LEVEL = st.sampled_from(["ce", "v1", "d", "a1", "d1", "prompt", "+", "#", ""])


class FakeRegistry:
    """A registry in memory, which counts its look-ups and may be away."""

    def __init__(self, *names: str) -> None:
        self.known = {name: Grants(Role.DEVICE, name) for name in names or ("d1",)}
        self.lookups: list[Sequence[tuple[str, str]]] = []
        self.threads: set[threading.Thread] = set()
        self.num_changes = 0
        self.is_away = False
        self.audit_log = self
        self.identities = self

    def newest_change(self) -> int:
        if self.is_away:
            raise RegistryError("PostgreSQL is away")
        return self.num_changes

    def admitted_holders(self, holders: Sequence[tuple[str, str]]) -> list[Grants | None]:
        self.newest_change()
        self.lookups.append(holders)
        self.threads.add(threading.current_thread())
        return [
            self.known.get(name) if fingerprint == HOLDER.fingerprint else None
            for name, fingerprint in holders
        ]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_without_a_change_the_rights_of_all_are_read_once() -> None:
    async def scenario() -> None:
        registry = FakeRegistry()
        rights = RightsCache(registry, Clock())
        await rights.read(HOLDER)
        for _ in range(5):
            await rights.refresh([HOLDER])
            assert rights.get(HOLDER) == DEVICE
        assert registry.lookups == [[HOLDER], [HOLDER]]

    asyncio.run(scenario())


def test_a_change_costs_one_look_up_for_a_thousand_holders() -> None:
    async def scenario() -> None:
        names = [f"d{i}" for i in range(1_000)]
        holders = [CertificateHolder(name, HOLDER.fingerprint) for name in names]
        registry = FakeRegistry(*names)
        rights = RightsCache(registry)
        await asyncio.gather(*map(rights.read, holders))
        await rights.refresh(holders)
        registry.lookups.clear()
        registry.num_changes += 1
        del registry.known["d7"]
        await rights.refresh(holders)
        assert len(registry.lookups) == 1
        assert [each for each in holders if not rights.get(each)] == [holders[7]]

    asyncio.run(scenario())


def test_clients_that_connect_at_once_share_a_look_up() -> None:
    async def scenario() -> None:
        names = [f"d{i}" for i in range(100)]
        registry = FakeRegistry(*names)
        rights = RightsCache(registry)
        holders = [CertificateHolder(name, HOLDER.fingerprint) for name in names]
        found = await asyncio.gather(*map(rights.read, holders))
        assert [grants.name for grants in found if grants] == names
        assert len(registry.lookups) <= 2
        assert threading.current_thread() not in registry.threads

    asyncio.run(scenario())


def test_an_expired_certificate_has_no_rights_after_the_next_check() -> None:
    async def scenario() -> None:
        registry = FakeRegistry()
        clock = Clock()
        rights = RightsCache(registry, clock)
        await rights.read(HOLDER)
        await rights.refresh([HOLDER])
        registry.known.clear()  # no change is recorded
        clock.now += RECHECK_S
        await rights.refresh([HOLDER])
        assert not rights.permits(HOLDER, Action.PUBLISH, "ce/v1/d/d1/status")

    asyncio.run(scenario())


def test_the_last_known_rights_hold_for_minutes_while_the_registry_is_away(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        registry = FakeRegistry()
        clock = Clock()
        rights = RightsCache(registry, clock)
        await rights.read(HOLDER)
        await rights.refresh([HOLDER])
        registry.is_away = True
        clock.now += HOLD_S
        for _ in range(3):
            await rights.refresh([HOLDER])
        assert await rights.read(HOLDER) == DEVICE
        clock.now += 1.0
        assert await rights.read(HOLDER) is None
        registry.is_away = False
        await rights.refresh([HOLDER])
        assert rights.get(HOLDER) == DEVICE

    asyncio.run(scenario())
    assert caplog.text.count("PostgreSQL is away") == 1
    assert "the registry is back" in caplog.text


def test_a_registry_that_hangs_delays_a_connection_and_occupies_one_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rights_cache, "LOOKUP_S", 0.05)
    released = threading.Event()

    class HangingRegistry(FakeRegistry):
        def newest_change(self) -> int:
            self.threads.add(threading.current_thread())
            released.wait(10.0)
            return super().newest_change()

    async def scenario() -> None:
        registry = HangingRegistry()
        rights = RightsCache(registry)
        for _ in range(3):
            assert await rights.read(HOLDER) is None
            assert rights.is_registry_away
        assert len(registry.threads) == 1
        released.set()
        await rights.refresh([])
        assert await rights.read(HOLDER) == DEVICE

    asyncio.run(scenario())


def test_another_certificate_of_the_same_name_has_rights_of_its_own() -> None:
    async def scenario() -> None:
        rights = RightsCache(FakeRegistry())
        assert await rights.read(HOLDER) == DEVICE
        assert await rights.read(CertificateHolder("d1", "b" * 64)) is None

    asyncio.run(scenario())


def test_a_name_without_enrolment_has_no_rights() -> None:
    holder = CertificateHolder("d9", HOLDER.fingerprint)
    rights = RightsCache(FakeRegistry())
    assert asyncio.run(rights.read(holder)) is None
    assert not rights.permits(holder, Action.PUBLISH, "ce/v1/d/d9/status")


@pytest.mark.parametrize(
    ("grants", "action", "topic", "allowed"),
    [
        (DEVICE, Action.PUBLISH, "ce/v1/d/d1/status", True),
        (DEVICE, Action.PUBLISH, "ce/v1/d/d2/status", False),
        (DEVICE, Action.SUBSCRIBE, "ce/v1/d/d1/status", False),
        (DEVICE, Action.SUBSCRIBE, "ce/v1/d/d1/prompt/+/+", True),
        (DEVICE, Action.SUBSCRIBE, "ce/v1/d/d1/prompt/#", False),
        (Grants(Role.APP, "a1", ("d1", "d3")), Action.PUBLISH, "ce/v1/d/d3/prompt/a1/r1", True),
        (Grants(Role.APP, "a1", ("d1", "d3")), Action.PUBLISH, "ce/v1/d/d2/prompt/a1/r1", False),
        (Grants(Role.APP, "a1"), Action.PUBLISH, "ce/v1/d//prompt/a1/r1", False),
    ],
)
def test_an_identity_has_the_rights_of_its_role_and_targets(
    grants: Grants, action: Action, topic: str, allowed: bool
) -> None:
    assert grants.permits(action, topic) is allowed


@given(st.sampled_from(Role), st.sampled_from(Action), st.lists(LEVEL, min_size=1, max_size=7))
def test_a_topic_is_permitted_if_and_only_if_a_rule_of_mosquitto_covers_it(
    role: Role, action: Action, levels: list[str]
) -> None:
    grants = Grants(role, "a1", ("d1", "d2"))
    topic = "/".join(levels)
    expected = "#" not in levels and any(
        matches(each, topic.replace("+", "\0")) if "+" in levels else matches(each, topic)
        for each in grants.filters[action]
    )
    assert grants.permits(action, topic) is expected


def test_mosquitto_gets_the_same_rights_line_by_line() -> None:
    assert acl_rules(Grants(Role.APP, "a1", ("d1",))) == [
        "user a1",
        "topic write ce/v1/d/d1/prompt/a1/+",
        "topic write ce/v1/d/d1/cancel/a1/+",
        "topic write ce/v1/e/a1/+",
        "topic read ce/v1/d/+/reply/a1/+",
        "topic read ce/v1/d/d1/status",
    ]


def test_mosquittos_rights_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    config = write_config(tmp_path / "mosquitto", 8883, TLS, [DEVICE])
    acl = config.parent / "acl"
    assert acl.stat().st_mode & 0o777 == 0o600
    assert f"acl_file {acl}" in config.read_text()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="choose another folder"):
        write_config(tmp_path / "file", 8883, TLS, [DEVICE])


@pytest.mark.parametrize("name", ["mosquitto.conf", "acl"])
def test_files_of_another_mosquitto_are_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("listener 1883\n")
    with pytest.raises(ConfigError, match="of another mosquitto, expected a new folder"):
        write_config(tmp_path, 8883, TLS, [DEVICE])
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_files_of_the_fleet_are_replaced_and_become_private(tmp_path: Path) -> None:
    config = write_config(tmp_path, 8883, TLS, [DEVICE])
    acl = config.parent / "acl"
    acl.chmod(0o644)
    write_config(tmp_path, 8884, TLS, [])
    assert acl.stat().st_mode & 0o777 == config.stat().st_mode & 0o777 == 0o600
    assert "listener 8884" in config.read_text()
