"""The contract of every transport, on each kind of broker."""

from __future__ import annotations

import logging
import threading

import pytest

from fleet.errors import LinkError
from fleet.protocol import topics
from fleet.transport.base import MAX_QUEUED, Will
from tests.brokers import WAIT_S, Inbox, wait_until
from tests.fleet.transport.conftest import World

SESSION = topics.to_device("d1", "s1")
STATUS = topics.device_status("d1")


def test_a_message_reaches_its_subscriber(world: World) -> None:
    inbox = Inbox()
    world.connect("d1").subscribe("ce/v1/d/d1/s/+", inbox)
    world.connect("w1").publish(SESSION, b"hello")
    assert inbox.get() == (SESSION, b"hello")


@pytest.mark.parametrize("qos", [0, 1])
def test_two_thousand_messages_come_in_order(world: World, qos: int) -> None:
    inbox = Inbox()
    world.connect("d1").subscribe(SESSION, inbox, qos=qos)
    worker = world.connect("w1")
    wanted = [b"%d" % i for i in range(2000)]
    for i, payload in enumerate(wanted):
        worker.publish(SESSION, payload, qos=qos)
        if i % 500 == 499:
            assert inbox.until(payload) == wanted[i - 499 : i]
    assert inbox.is_empty


def test_a_retained_message_reaches_a_later_subscriber(world: World) -> None:
    world.connect("d1").publish(STATUS, b"born", qos=1, retain=True)
    watcher = world.connect("s1")
    inbox = Inbox()

    def asked() -> bool:
        watcher.subscribe(topics.DEVICE_STATUS_FILTER, inbox, qos=1)
        return not inbox.is_empty

    wait_until(asked, "the retained message came")
    assert inbox.get() == (STATUS, b"born")


def test_a_live_subscription_receives_no_retained_message(world: World) -> None:
    device = world.connect("d1")
    device.publish(STATUS, b"born", qos=1, retain=True)
    watcher = world.connect("s1")
    inbox = Inbox()
    live = Inbox()

    def asked() -> bool:
        watcher.subscribe(STATUS, live, qos=1, live_only=True)
        watcher.subscribe(topics.DEVICE_STATUS_FILTER, inbox, qos=1)
        return not inbox.is_empty

    wait_until(asked, "the retained message came")
    assert inbox.get() == (STATUS, b"born")
    with world.outage():
        pass
    device.publish(STATUS, b"now", qos=1)
    assert live.get() == (STATUS, b"now")


def test_a_message_that_is_not_retained_does_not_reach_a_later_subscriber(world: World) -> None:
    device = world.connect("d1")
    device.publish(STATUS, b"early", qos=1)
    device.close()
    inbox = Inbox()
    world.connect("s1").subscribe(STATUS, inbox)
    world.connect("d1").publish(STATUS, b"late")
    assert inbox.get() == (STATUS, b"late")


def test_an_empty_retained_message_clears_the_one_before(world: World) -> None:
    device = world.connect("d1")
    device.publish(STATUS, b"born", qos=1, retain=True)
    device.publish(STATUS, b"", qos=1, retain=True)
    device.close()
    inbox = Inbox()
    world.connect("s1").subscribe(STATUS, inbox)
    world.connect("d1").publish(STATUS, b"now")
    assert inbox.get() == (STATUS, b"now")


def test_the_will_is_published_when_the_connection_breaks(world: World) -> None:
    inbox = Inbox()
    world.connect("s1").subscribe(topics.DEVICE_STATUS_FILTER, inbox, qos=1)
    world.kill(world.connect("d1", Will(STATUS, b"dead")))
    assert inbox.get() == (STATUS, b"dead")


def test_the_will_stays_as_a_retained_message(world: World) -> None:
    first = Inbox()
    later = Inbox()
    world.connect("s1").subscribe(STATUS, first, qos=1)
    world.kill(world.connect("d1", Will(STATUS, b"dead")))
    first.get()
    world.connect("a1").subscribe(STATUS, later, qos=1)
    assert later.get() == (STATUS, b"dead")


def test_the_will_is_not_published_after_a_goodbye(world: World) -> None:
    inbox = Inbox()
    world.connect("s1").subscribe(STATUS, inbox, qos=1)
    world.connect("d1", Will(STATUS, b"dead")).close()
    world.connect("d1").publish(STATUS, b"born again", qos=1)
    assert inbox.get() == (STATUS, b"born again")


def test_nothing_comes_after_unsubscribing(world: World) -> None:
    device = world.connect("d1")
    worker = world.connect("w1")
    gone = Inbox()
    kept = Inbox()
    device.subscribe(SESSION, gone)
    device.subscribe(topics.to_device("d1", "s2"), kept)
    device.unsubscribe(SESSION)
    worker.publish(SESSION, b"into the void")
    worker.publish(topics.to_device("d1", "s2"), b"marker")
    kept.get()
    assert gone.is_empty


def test_a_handler_that_fails_is_logged_and_the_next_message_still_comes(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    inbox = Inbox()

    def fail_on_first(topic: str, payload: bytes) -> None:
        inbox(topic, payload)
        if payload == b"first":
            raise ValueError("a handler's mistake")

    world.connect("d1").subscribe(SESSION, fail_on_first)
    worker = world.connect("w1")
    with caplog.at_level(logging.ERROR):
        worker.publish(SESSION, b"first")
        worker.publish(SESSION, b"second")
        assert [inbox.get()[1], inbox.get()[1]] == [b"first", b"second"]
    assert "a handler's mistake" in caplog.text


def test_a_handler_may_subscribe_and_publish(world: World) -> None:
    device = world.connect("d1")
    worker = world.connect("w1")
    inbox = Inbox()
    worker.subscribe(topics.to_worker("w1", "d1", "s1"), inbox)

    def answer(_topic: str, payload: bytes) -> None:
        device.subscribe(topics.to_device("d1", "s2"), Inbox())
        device.publish(topics.to_worker("w1", "d1", "s1"), payload + b" yourself")

    device.subscribe(SESSION, answer)
    worker.publish(SESSION, b"hello")
    assert inbox.get()[1] == b"hello yourself"


def test_every_handler_with_a_matching_filter_is_called(world: World) -> None:
    device = world.connect("d1")
    exact = Inbox()
    wide = Inbox()
    device.subscribe(SESSION, exact)
    device.subscribe("ce/v1/d/d1/s/+", wide)
    world.connect("w1").publish(SESSION, b"both")
    assert (exact.get()[1], wide.get()[1]) == (b"both", b"both")


def test_on_up_is_called_at_once_when_the_link_is_up(world: World) -> None:
    calls: list[str] = []
    world.connect("d1").on_up(lambda: calls.append("up"))
    assert calls == ["up"]


def test_subscriptions_and_announcements_come_back_after_an_outage(world: World) -> None:
    device = world.connect("d1")
    watcher = world.connect("s1")
    worker = world.connect("w1")
    inbox = Inbox()
    seen = Inbox()
    device.subscribe(SESSION, inbox)
    watcher.subscribe(STATUS, seen, qos=1)
    device.on_up(lambda: device.publish(STATUS, b"born", qos=1, retain=True))
    assert seen.get() == (STATUS, b"born")
    with world.outage():
        pass
    assert seen.get() == (STATUS, b"born")
    worker.publish(SESSION, b"after")
    assert inbox.get() == (SESSION, b"after")


def test_a_subscription_made_in_an_outage_counts_after_it(world: World) -> None:
    device = world.connect("d1")
    worker = world.connect("w1")
    inbox = Inbox()
    with world.outage():
        device.subscribe(SESSION, inbox)

    def delivered() -> bool:
        worker.publish(SESSION, b"after")
        return not inbox.is_empty

    wait_until(delivered, "a message came")
    assert inbox.get() == (SESSION, b"after")


def test_qos_0_is_refused_in_an_outage(world: World) -> None:
    worker = world.connect("w1")
    with world.outage(), pytest.raises(LinkError, match="no link"):
        worker.publish(SESSION, b"lost")


def test_qos_1_is_kept_in_an_outage_and_delivered_after_it(world: World) -> None:
    device = world.connect("d1")
    watcher = world.connect("s1")
    inbox = Inbox()
    with world.outage():
        watcher.close()
        device.publish(STATUS, b"queued", qos=1, retain=True)
    world.connect("s1").subscribe(STATUS, inbox, qos=1)
    assert inbox.get() == (STATUS, b"queued")


def test_the_queue_of_an_outage_has_a_limit(world: World) -> None:
    device = world.connect("d1")
    with world.outage():
        for _ in range(MAX_QUEUED):
            device.publish(STATUS, b"queued", qos=1)
        with pytest.raises(LinkError, match="wait for the broker"):
            device.publish(STATUS, b"one too many", qos=1)


def test_a_retained_message_goes_into_a_full_queue(world: World) -> None:
    device = world.connect("d1")
    with world.outage():
        for _ in range(MAX_QUEUED):
            device.publish(STATUS, b"queued", qos=1)
        device.publish(STATUS, b"born", qos=1, retain=True)
    watcher = world.connect("s1")
    inbox = Inbox()

    def is_there() -> bool:
        watcher.subscribe(topics.DEVICE_STATUS_FILTER, inbox, qos=1)
        received = []
        while not inbox.is_empty:
            received.append(inbox.get())
        return (STATUS, b"born") in received

    wait_until(is_there, "the retained message came")


def test_when_the_link_comes_up_callbacks_are_called_before_anything_comes(world: World) -> None:
    watcher = world.connect("s1")
    order = []
    came = threading.Event()

    def on_status(topic: str, payload: bytes) -> None:
        order.append(topic)
        came.set()

    watcher.on_up(lambda: order.append("up"))
    watcher.subscribe(topics.DEVICE_STATUS_FILTER, on_status, qos=1)
    device = world.connect("d1")
    device.on_up(lambda: device.publish(STATUS, b"born", qos=1, retain=True))
    assert came.wait(WAIT_S)
    order.clear()
    came.clear()
    with world.outage():
        pass
    assert came.wait(WAIT_S)
    assert order[:2] == ["up", STATUS]


def test_a_closed_transport_refuses_messages(world: World) -> None:
    device = world.connect("d1")
    device.close()
    assert not device.is_up
    with pytest.raises(LinkError, match="closed"):
        device.publish(STATUS, b"too late", qos=1)


def test_closing_twice_does_no_harm(world: World) -> None:
    device = world.connect("d1")
    device.close()
    device.close()


def test_a_callback_that_was_taken_back_is_not_called_again(world: World) -> None:
    device = world.connect("d1")
    calls = []
    kept = threading.Event()
    device.on_up(gone := lambda: calls.append(1))
    device.on_up(lambda: kept.set() if calls else None)
    device.off_up(gone)
    kept.clear()
    with world.outage():
        pass
    assert kept.wait(WAIT_S)
    assert calls == [1]
