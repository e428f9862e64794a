"""The messages that a broker retains of a device or a worker end with its deletion."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from fleet.identity.identity import Identity
from fleet.protocol import topics
from fleet.protocol.access import Role
from fleet.protocol.report import DeviceStatus, WorkerStatus, encode_status
from fleet.registry.store import Registry
from fleet.server.home import FleetConfig, FleetHome
from fleet.server.supervisor import server_processes
from fleet.transport.base import Will
from fleet.transport.mqtt import MqttTransport
from tests.brokers import BROKERS, HOST, Inbox, free_port, wait_until

WAIT_S: Final = 120.0
BIRTH: Final = {
    Role.DEVICE: encode_status(DeviceStatus(online=True, epoch=1, bundle_id="b1")),
    Role.WORKER: encode_status(WorkerStatus(online=True, epoch=1, bundle_ids=("b1",))),
}
STATUS_TOPICS: Final = {Role.DEVICE: topics.device_status, Role.WORKER: topics.worker_status}


@pytest.fixture(params=BROKERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def home(tmp_path: Path) -> FleetHome:
    config = FleetConfig(host=HOST, port=free_port(), bundle="/no/bundle", service_port=0)
    return FleetHome.create(tmp_path / "state", config)


@contextmanager
def announced(identity: Identity) -> Iterator[None]:
    """A device or a worker that has published its birth, and has a last will."""
    role = identity.config.role
    topic = STATUS_TOPICS[role](identity.name)
    with MqttTransport.connect(identity, will=Will(topic, b'{"online":false,"epoch":1}')) as link:
        link.on_up(lambda: link.publish(topic, BIRTH[role], qos=1, retain=True))
        # The birth is published again once the broker knows the rights of a new device.
        link.subscribe(topics.device_config(identity.name), Inbox(), qos=1, retained=True)
        yield


def retained_statuses(link: MqttTransport) -> set[str]:
    """Return the names with a retained status; the broker sends them before the denylist."""
    inbox = Inbox()
    for topic_filter in (
        topics.DEVICE_STATUS_FILTER,
        topics.WORKER_STATUS_FILTER,
        topics.REVOKED,
    ):
        link.unsubscribe(topic_filter)
        link.subscribe(topic_filter, inbox, qos=1)
    names = set()
    while (topic := inbox.get()[0]) != topics.REVOKED:
        names.add(topic.split("/")[-2])
    return names


def wait_until_retained(link: MqttTransport, name: str) -> None:
    wait_until(lambda: name in retained_statuses(link), f"the status of {name} is there", WAIT_S)


def delete(registry: Registry, name: str) -> None:
    registry.identities.revoke(name)
    registry.identities.delete(name)


def test_a_deleted_devices_and_a_deleted_workers_status_are_cleared(
    home: FleetHome, tmp_path: Path, kind: str
) -> None:
    """One of the devices is connected until its deletion, the others have left."""
    names = {"kitchen": Role.DEVICE, "cellar": Role.DEVICE, "cloud": Role.WORKER}
    kept = home.enroll("hall", Role.DEVICE, tmp_path / "hall")
    identities = {name: home.enroll(name, role, tmp_path / name) for name, role in names.items()}
    with (
        server_processes(home, broker=kind),
        home.registry() as registry,
        home.operator() as operator,
        MqttTransport.connect(operator) as link,
        announced(kept),
        announced(identities["kitchen"]),
    ):
        for name in ("cellar", "cloud"):
            with announced(identities[name]):
                wait_until_retained(link, name)
        assert retained_statuses(link) == {"hall", *names}
        for name in names:
            delete(registry, name)
        wait_until(lambda: retained_statuses(link) == {"hall"}, "hall alone is there", WAIT_S)


def test_a_name_that_is_enrolled_again_keeps_its_status_until_its_next_deletion(
    home: FleetHome, tmp_path: Path, kind: str
) -> None:
    with (
        server_processes(home, broker=kind),
        home.registry() as registry,
        home.operator() as operator,
        MqttTransport.connect(operator) as link,
    ):
        for number in range(2):
            with announced(home.enroll("kitchen", Role.DEVICE, tmp_path / f"kitchen-{number}")):
                wait_until_retained(link, "kitchen")
            delete(registry, "kitchen")
            wait_until(lambda: not retained_statuses(link), "no status is left", WAIT_S)
