"""The workers that a device believes to be online."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from edge_agent.session.worker_directory import WorkerDirectory
from fleet.protocol import topics
from fleet.protocol.report import WorkerStatus, encode_status
from fleet.transport.base import Transport
from fleet.transport.in_memory import InMemoryBroker
from tests.brokers import wait_until

ONLINE = encode_status(WorkerStatus(online=True, epoch=1, bundle_ids=("b1",)))


@pytest.fixture
def broker() -> InMemoryBroker:
    return InMemoryBroker()


@pytest.fixture
def server(broker: InMemoryBroker) -> Iterator[Transport]:
    with broker.connect("server") as server:
        yield server


def test_a_worker_that_left_while_the_broker_was_away_is_there_no_more(
    broker: InMemoryBroker, server: Transport
) -> None:
    """Its will was not kept, and its birth is not retained any more."""
    for worker in ("w1", "w2"):
        server.publish(topics.worker_status(worker), ONLINE, qos=1, retain=True)
    with broker.connect("d1") as link, WorkerDirectory(link, lambda _: None) as workers:
        wait_until(lambda: workers.statuses.keys() == {"w1", "w2"}, "both are known")
        link.drop()
        server.publish(topics.worker_status("w1"), b"", qos=1, retain=True)
        link.restore()
        wait_until(lambda: workers.statuses.keys() == {"w2"}, "one is left")
        link.drop()
        server.publish(topics.worker_status("w2"), b"", qos=1, retain=True)
        link.restore()
        wait_until(lambda: not workers.serves("b1"), "none is left")
        assert workers.why_none("b1") == "no cloud worker is online; start one with 'fleet up'"


def test_a_worker_whose_status_is_cleared_is_there_no_more(
    broker: InMemoryBroker, server: Transport
) -> None:
    """The server clears the status of a worker that is deleted."""
    with broker.connect("d1") as link, WorkerDirectory(link, lambda _: None) as workers:
        server.publish(topics.worker_status("w1"), ONLINE, qos=1, retain=True)
        wait_until(lambda: workers.serves("b1"), "it is known")
        server.publish(topics.worker_status("w1"), b"", qos=1, retain=True)
        wait_until(lambda: not workers.statuses, "none is left")
