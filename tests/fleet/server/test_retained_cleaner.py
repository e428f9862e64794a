"""Removal of the retained messages of deleted identities."""

from __future__ import annotations

from fleet.protocol import topics
from fleet.protocol.access import Role
from fleet.registry.store import Registry
from fleet.server.retained_cleaner import RetainedCleaner
from fleet.transport.in_memory import InMemoryBroker
from tests.brokers import Inbox
from tests.fleet.conftest import add

RETAINED = {
    topics.device_status("kitchen"),
    topics.device_config("kitchen"),
    topics.worker_status("cloud"),
}


def test_every_retained_message_of_a_deleted_identity_is_cleared_once(registry: Registry) -> None:
    broker = InMemoryBroker()
    inbox = Inbox()
    for name, role in (("kitchen", Role.DEVICE), ("cloud", Role.WORKER), ("hall", Role.DEVICE)):
        add(registry, name, role)
    with broker.connect("server") as link:
        kept = (topics.device_status("hall"), b"kept")
        for topic in (*RETAINED, kept[0]):
            link.publish(topic, b"kept", qos=1, retain=True)
        cleaner = RetainedCleaner(link, registry)
        cleaner.clear()
        for name in ("kitchen", "cloud"):
            registry.identities.revoke(name)
            registry.identities.delete(name)
        cleaner.clear()
        with broker.connect("later") as later:
            later.subscribe("ce/v1/#", inbox)
            assert inbox.get() == kept
            cleaner.clear()
            assert inbox.is_empty
            cleaner.reset()
            cleaner.clear()
            cleared = [inbox.get() for _ in RETAINED]
            assert {topic for topic, payload in cleared if not payload} == RETAINED
