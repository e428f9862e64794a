"""Desired configuration in the registry, its publication, and the tasks after a change."""

from __future__ import annotations

import errno
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace

from fleet.errors import ConfigError, LinkError, UnknownDeviceError
from fleet.protocol import topics
from fleet.protocol.desired_config import DesiredConfig, Settings, decode_desired
from fleet.protocol.modes import Mode
from fleet.registry.store import Registry
from fleet.registry.targets import Scope, Target
from fleet.server.change_watcher import ChangeWatcher
from fleet.server.config_publisher import ConfigPublisher
from fleet.transport.in_memory import InMemoryBroker
from tests.brokers import WAIT_S, Inbox, wait_until
from tests.fleet.conftest import add

ALL = Target(Scope.ALL)
KITCHEN = Target(Scope.GROUP, "kitchen")
EDGE = Target(Scope.DEVICE, "edge-1")


@pytest.fixture
def fleet(registry: Registry) -> Registry:
    """A registry with edge-1 in the group kitchen, and edge-2 in no group."""
    add(registry, "edge-1", group="kitchen")
    add(registry, "edge-2")
    return registry


def change(registry: Registry, target: Target, settings: Settings) -> int:
    return registry.desired_state.change_settings(target, lambda _: settings)


def test_a_device_without_settings_has_version_0(fleet: Registry) -> None:
    assert fleet.desired_state.configs() == dict.fromkeys(
        ("edge-1", "edge-2"), DesiredConfig(0, Settings())
    )


def test_a_device_follows_the_narrowest_scope_and_its_newest_version(fleet: Registry) -> None:
    device = change(fleet, EDGE, Settings(max_draft=2))
    group = change(fleet, KITCHEN, Settings(max_draft=4, mode=Mode.AUTO))
    everywhere = change(fleet, ALL, Settings(threshold=0.5, mode=Mode.STANDALONE))
    assert device < group < everywhere
    assert fleet.desired_state.configs() == {
        "edge-1": DesiredConfig(everywhere, Settings(threshold=0.5, mode=Mode.AUTO, max_draft=2)),
        "edge-2": DesiredConfig(everywhere, Settings(threshold=0.5, mode=Mode.STANDALONE)),
    }


def test_a_change_receives_the_newest_settings(fleet: Registry) -> None:
    change(fleet, EDGE, Settings(max_draft=2))
    fleet.desired_state.change_settings(
        EDGE, lambda settings: Settings(max_draft=(settings.max_draft or 0) + 1)
    )
    assert fleet.desired_state.settings(EDGE) == Settings(max_draft=3)
    assert fleet.desired_state.settings(ALL) == Settings()


def test_of_two_changes_at_once_the_later_receives_the_earlier(
    fleet: Registry, registry_url: str
) -> None:
    with Registry.open(registry_url, "another") as other, ThreadPoolExecutor(1) as pool:

        def slowly(settings: Settings) -> Settings:
            futures.append(
                pool.submit(
                    other.desired_state.change_settings, EDGE, partial(replace, threshold=0.5)
                )
            )
            assert wait(futures, timeout=0.3).not_done, "it has to wait for us"
            return replace(settings, max_draft=2)

        futures: list[Future[int]] = []
        first = fleet.desired_state.change_settings(EDGE, slowly)
        assert futures[0].result(30) > first
    assert fleet.desired_state.settings(EDGE) == Settings(max_draft=2, threshold=0.5)


def test_a_change_is_in_the_audit_log_with_its_actor(fleet: Registry) -> None:
    version = change(fleet, KITCHEN, Settings(max_draft=4))
    (row,) = fleet.audit_log.entries("group:kitchen")
    assert (row.actor, row.action) == (fleet.actor, "config")
    assert row.details == {"version": version, "settings": {"max_draft": 4}}


def test_settings_of_an_unknown_target_are_refused_and_leave_no_trace(fleet: Registry) -> None:
    newest = fleet.audit_log.newest_change()
    with pytest.raises(UnknownDeviceError, match="unknown device 'edge-9'"):
        change(fleet, Target(Scope.DEVICE, "edge-9"), Settings(max_draft=4))
    with pytest.raises(ConfigError, match="no device is in the group 'attic'"):
        change(fleet, Target(Scope.GROUP, "attic"), Settings(max_draft=4))
    assert fleet.audit_log.newest_change() == newest


def test_a_device_reads_its_desired_configuration_also_when_it_connects_later(
    fleet: Registry,
) -> None:
    broker = InMemoryBroker()
    with broker.connect("server") as server:
        publisher = ConfigPublisher(server, fleet)
        version = change(fleet, EDGE, Settings(max_draft=2))
        publisher.publish()
        with broker.connect("edge-1") as device:
            inbox = Inbox()
            device.subscribe(topics.device_config("edge-1"), inbox)
            assert decode_desired(inbox.get()[1]) == DesiredConfig(version, Settings(max_draft=2))
            publisher.publish()
            assert inbox.is_empty
            newer = change(fleet, ALL, Settings(threshold=0.5))
            publisher.publish()
            assert decode_desired(inbox.get()[1]).version == newer
            publisher.reset()
            publisher.publish()
            assert decode_desired(inbox.get()[1]).version == newer


def test_the_configuration_of_a_deleted_device_is_no_longer_retained(fleet: Registry) -> None:
    broker = InMemoryBroker()
    with broker.connect("server") as server, broker.connect("watcher") as watcher:
        publisher = ConfigPublisher(server, fleet)
        publisher.publish()
        inbox = Inbox()
        watcher.subscribe(topics.device_config("edge-1"), inbox)
        inbox.get()
        fleet.identities.revoke("edge-1")
        fleet.identities.delete("edge-1")
        publisher.publish()
        assert inbox.get()[1] == b""
        publisher.publish()
        assert inbox.is_empty


def test_a_version_of_the_software_is_beside_the_settings_and_replaces_narrower_ones(
    fleet: Registry,
) -> None:
    state = fleet.desired_state
    change(fleet, EDGE, Settings(max_draft=2))
    first = state.roll_out_software(KITCHEN, "1.1")
    assert state.configs()["edge-1"] == DesiredConfig(first, Settings(max_draft=2), "1.1")
    assert state.configs()["edge-2"].software is None
    state.roll_out_software(EDGE, "1.2")
    assert state.configs()["edge-1"].software == "1.2"
    everywhere = state.roll_out_software(ALL, "1.3")
    assert {config.software for config in state.configs().values()} == {"1.3"}
    assert state.settings(EDGE) == Settings(max_draft=2)
    assert state.settings(KITCHEN) == Settings()
    assert state.roll_out_software(ALL, "1.3") > everywhere  # once more, after a failure


def test_a_version_for_a_group_replaces_that_of_its_devices_alone(fleet: Registry) -> None:
    state = fleet.desired_state
    state.roll_out_software(EDGE, "1.2")
    state.roll_out_software(Target(Scope.DEVICE, "edge-2"), "1.2")
    state.roll_out_software(KITCHEN, "1.3")
    assert state.configs()["edge-1"].software == "1.3"
    assert state.configs()["edge-2"].software == "1.2"
    with pytest.raises(ConfigError, match="no device is in the group 'attic'"):
        state.roll_out_software(Target(Scope.GROUP, "attic"), "1.3")


def test_a_task_runs_at_the_start_and_after_each_change_of_another_process(
    fleet: Registry, registry_url: str
) -> None:
    runs = threading.Semaphore(0)
    watcher = ChangeWatcher(fleet, poll_s=0.02)
    watcher.add(runs.release)
    with watcher, Registry.open(registry_url, "another") as other:
        assert runs.acquire(timeout=WAIT_S)
        assert not runs.acquire(timeout=0.2)
        change(other, EDGE, Settings(max_draft=2))
        assert runs.acquire(timeout=WAIT_S)
        watcher.run_again()
        assert runs.acquire(timeout=WAIT_S)


def test_a_task_that_fails_is_retried_and_delays_no_other(fleet: Registry) -> None:
    attempts = []
    others = threading.Semaphore(0)

    def failing() -> None:
        attempts.append(1)
        if len(attempts) < 3:
            raise LinkError("the link is down")

    watcher = ChangeWatcher(fleet, poll_s=0.02)
    watcher.add(failing)
    watcher.add(others.release, periodic=True)
    with watcher:
        wait_until(lambda: len(attempts) == 3, "the third attempt")
        assert others.acquire(timeout=WAIT_S)
        for _ in range(5):
            assert others.acquire(timeout=WAIT_S)
    assert len(attempts) == 3


def test_a_task_that_fails_in_each_round_is_logged_once_in_a_while(
    fleet: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    errors = [PermissionError(errno.EACCES, "no"), LinkError("away"), LinkError("away")]
    attempts = []

    def failing() -> None:
        attempts.append(1)
        if errors:
            raise errors.pop(0)

    watcher = ChangeWatcher(fleet, poll_s=0.02)
    watcher.add(failing)
    with watcher:
        wait_until(lambda: len(attempts) == 4, "the fourth attempt")
    assert caplog.messages == ["[Errno 13] no; trying again"]


def test_the_watcher_survives_an_unexpected_error(
    fleet: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = threading.Semaphore(0)
    newest = fleet.audit_log.newest_change
    left = [1, 1]

    def out_of_descriptors() -> int:
        if left:
            left.pop()
            raise OSError(errno.EMFILE, "Too many open files")
        return newest()

    monkeypatch.setattr(fleet.audit_log, "newest_change", out_of_descriptors)
    watcher = ChangeWatcher(fleet, poll_s=0.02)
    watcher.add(runs.release)
    with watcher:
        assert runs.acquire(timeout=WAIT_S)


def test_changes_are_seen_again_once_the_registry_answers(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    runs = threading.Semaphore(0)
    with Registry.open(path) as registry:
        add(registry, "edge-1")
        watcher = ChangeWatcher(registry, poll_s=0.02)
        watcher.add(runs.release)
        with watcher:
            assert runs.acquire(timeout=WAIT_S)
            path.rename(tmp_path / "away")
            path.touch()
            assert not runs.acquire(timeout=0.3)
            (tmp_path / "away").replace(path)
            change(registry, EDGE, Settings(max_draft=2))
            assert runs.acquire(timeout=WAIT_S)


@pytest.mark.parametrize("version", ["1!0.2.0", "latest", ""])
def test_settings_that_could_not_be_read_again_are_not_stored(
    version: str, fleet: Registry
) -> None:
    with pytest.raises(ConfigError, match="software"):
        fleet.desired_state.roll_out_software(EDGE, version)
    assert fleet.desired_state.configs()["edge-1"] == DesiredConfig(0, Settings())
