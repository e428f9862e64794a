"""A connection that changes to a new certificate."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from benchmarks.proxy import Proxy
from cloud_broker_worker.worker.config import WorkerConfig
from cloud_broker_worker.worker.worker import Worker
from edge_agent.config import AgentConfig
from edge_agent.serving.agent import Agent
from fleet.bundles.manifest import Bundle
from fleet.errors import IdentityError, LinkError
from fleet.identity.credentials import new_key
from fleet.identity.identity import CERT_FILE, KEY_FILE, Identity
from fleet.protocol import topics
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import PromptRequest
from fleet.transport import mqtt
from fleet.transport.base import Will
from fleet.transport.mqtt import MqttTransport
from fleet.transport.prompt_client import PromptClient
from tests.brokers import BROKERS, WAIT_S, Inbox, Site, running_site, wait_until
from tests.edge_agent.certify import certify_key

WILL = Will(topics.device_status("d1"), b"gone")
NUM_TOKENS = 300


@pytest.fixture(params=BROKERS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    with running_site(request.param, tmp_path) as running:
        yield running


class Blocked:
    """A handler that blocks until its test releases it."""

    def __init__(self) -> None:
        self.has_begun = threading.Event()
        self.may_end = threading.Event()

    def __call__(self, topic: str, payload: bytes) -> None:
        self.has_begun.set()
        self.may_end.wait(WAIT_S)


def put_certificate(site: Site, identity: Identity, life: timedelta = timedelta(days=1)) -> None:
    """Put a new key and certificate into an identity's folder, valid for `life` from now."""
    key = new_key()
    public_key = load_pem_private_key(key, None).public_key()
    certificate = certify_key(site.authority, public_key, identity.name, life)  # type: ignore[arg-type]
    (identity.folder / KEY_FILE).write_bytes(key)
    (identity.folder / CERT_FILE).write_bytes(certificate)
    site.admit(identity)


def connect_for_seconds(site: Site, identity: Identity) -> tuple[MqttTransport, float]:
    """Connect with a certificate of two seconds, or longer on a busy machine; return its life."""
    for life_s in (2.0, 8.0):
        put_certificate(site, identity, timedelta(seconds=life_s))
        with suppress(LinkError):
            return MqttTransport.connect(identity), life_s
    put_certificate(site, identity, timedelta(seconds=30))
    return MqttTransport.connect(identity), 30.0


def test_a_renewed_connection_uses_the_new_certificate(site: Site) -> None:
    identity = site.identity("d1")
    connected = threading.Semaphore(0)
    device, life_s = connect_for_seconds(site, identity)
    with device:
        device.on_up(connected.release)
        put_certificate(site, identity)
        time.sleep(life_s + 0.1)  # the old one has expired
        device.reload_certificate()
        assert connected.acquire(timeout=WAIT_S)
        assert connected.acquire(timeout=WAIT_S)
        assert device.is_up


def test_a_renewed_connection_sends_no_will_and_keeps_its_subscriptions(site: Site) -> None:
    statuses = Inbox()
    sessions = Inbox()
    with (
        site.connect("s1") as watcher,
        site.connect("w1") as worker,
        site.connect("d1", WILL) as device,
    ):
        watcher.subscribe(topics.DEVICE_STATUS_FILTER, statuses, qos=1)
        device.subscribe(topics.to_device("d1", "s1"), sessions)
        device.reload_certificate()
        device.publish(WILL.topic, b"here", qos=1)
        assert statuses.get() == (WILL.topic, b"here")
        wait_until(lambda: device.is_up, "the link is up again")

        def said() -> bool:
            worker.publish(topics.to_device("d1", "s1"), b"hello")
            return not sessions.is_empty

        wait_until(said, "the subscription is back")


def test_files_that_do_not_load_leave_the_connection(site: Site) -> None:
    identity = site.identity("d1")
    with MqttTransport.connect(identity) as device:
        (identity.folder / CERT_FILE).write_text("no certificate")
        with pytest.raises(IdentityError, match="does not load"):
            device.reload_certificate()
        assert device.is_up


def test_a_link_that_is_down_comes_back_with_the_new_certificate(site: Site) -> None:
    identity = site.identity("d1")
    device, life_s = connect_for_seconds(site, identity)
    with device:
        site.broker.stop()
        wait_until(lambda: not device.is_up, "the link is down")
        put_certificate(site, identity)
        device.reload_certificate()
        time.sleep(life_s + 0.1)
        site.broker.start()
        wait_until(lambda: device.is_up, "the link is up again")


def test_a_transport_that_was_renewed_closes_and_leaves_no_thread(site: Site) -> None:
    device = site.connect("d1")
    device.reload_certificate()
    device.close()
    wait_until(
        lambda: not any("paho" in thread.name for thread in threading.enumerate()),
        "paho's thread ended",
    )


def test_a_connection_whose_handler_outlasts_the_call_is_renewed_afterwards(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt, "RELOAD_S", 0.2)
    session = topics.to_device("d1", "s1")
    handler = Blocked()
    connected = threading.Semaphore(0)
    with site.connect("w1") as worker, site.connect("d1") as device:
        device.on_up(connected.release)
        device.subscribe(session, handler)
        assert connected.acquire(timeout=WAIT_S)
        worker.publish(session, b"hello", qos=1)
        assert handler.has_begun.wait(WAIT_S)  # it blocks the transport's thread
        device.reload_certificate()
        device.reload_certificate()
        handler.may_end.set()
        assert connected.acquire(timeout=WAIT_S)
        assert device.is_up
        device.reload_certificate()
        assert connected.acquire(timeout=WAIT_S)


def test_a_connection_that_cannot_send_is_renewed_when_the_network_is_back(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt, "KEEP_ALIVE_S", 2)
    identity = site.identity("d1")
    connected = threading.Semaphore(0)
    with Proxy(site.port) as link:
        config = msgspec.structs.replace(identity.config, port=link.port)
        with MqttTransport.connect(Identity(identity.folder, config)) as device:
            device.on_up(connected.release)
            assert connected.acquire(timeout=WAIT_S)
            link.freeze()
            for _ in range(200):  # more than the buffers of the sockets hold
                device.publish(topics.to_worker("w1", "d1", "s1"), bytes(200_000))
            device.reload_certificate()
            link.heal()
            assert connected.acquire(timeout=2 * WAIT_S)
            assert device.is_up


def test_a_connection_that_is_closed_during_its_renewal_stays_closed(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt, "RELOAD_S", 0.2)
    session = topics.to_device("d1", "s1")
    handler = Blocked()
    with site.connect("w1") as worker, site.connect("d1") as device:
        device.subscribe(session, handler)
        worker.publish(session, b"hello", qos=1)
        assert handler.has_begun.wait(WAIT_S)
        device.reload_certificate()
        device.close()
        handler.may_end.set()
        wait_until(
            lambda: not any(each.name.endswith("-d1") for each in threading.enumerate()),
            "the threads of d1 have ended",
        )


@pytest.mark.parametrize("mode", [Mode.VERIFIED, Mode.COLLABORATIVE])
def test_an_answer_under_way_outlives_a_renewal(
    site: Site, tiny_bundle: Bundle, mode: Mode
) -> None:
    request = PromptRequest(
        prompt="How warm is it?", max_new_tokens=NUM_TOKENS, mode=mode, threshold=0.05
    )
    with (
        site.connect("w1", Will(topics.worker_status("w1"), Worker.will())) as cloud,
        site.connect("d1", Will(topics.device_status("d1"), Agent.will())) as edge,
        site.connect("a1") as app,
        Worker(cloud, tiny_bundle, WorkerConfig(num_threads=1)),
        Agent(edge, tiny_bundle, AgentConfig(num_threads=1)),
    ):
        replies = []
        for reply in PromptClient(app).ask("d1", request, timeout_s=WAIT_S):
            replies.append(reply)
            if reply.seq == 5:
                edge.reload_certificate()
    assert replies[-1].finish_reason == "length"
    assert len([reply for reply in replies if reply.token_id is not None]) == NUM_TOKENS
