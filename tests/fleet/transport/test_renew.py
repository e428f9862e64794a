"""A connection that changes to a new certificate."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
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
from fleet.errors import IdentityError
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


def wait_for(event: threading.Event) -> None:
    event.wait(WAIT_S)


def put_certificate(site: Site, identity: Identity, life: timedelta = timedelta(days=1)) -> None:
    """Put a new key and certificate into an identity's folder, valid for `life` from now."""
    key = new_key()
    public_key = load_pem_private_key(key, None).public_key()
    certificate = certify_key(site.authority, public_key, identity.name, life)  # type: ignore[arg-type]
    (identity.folder / KEY_FILE).write_bytes(key)
    (identity.folder / CERT_FILE).write_bytes(certificate)
    site.admit(identity)


def test_a_renewed_connection_uses_the_new_certificate(site: Site) -> None:
    identity = site.identity("d1")
    put_certificate(site, identity, timedelta(seconds=2))
    connected = threading.Semaphore(0)
    with MqttTransport.connect(identity) as device:
        device.on_up(connected.release)
        put_certificate(site, identity)
        time.sleep(2.1)  # the old one has expired
        device.reload_certificate()
        assert connected.acquire(timeout=10)
        assert connected.acquire(timeout=10)
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
    put_certificate(site, identity, timedelta(seconds=2))
    with MqttTransport.connect(identity) as device:
        site.broker.stop()
        wait_until(lambda: not device.is_up, "the link is down")
        put_certificate(site, identity)
        device.reload_certificate()
        time.sleep(2.1)
        site.broker.start()
        wait_until(lambda: device.is_up, "the link is up again", timeout_s=20)


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
    is_handled = threading.Event()
    connected = threading.Semaphore(0)
    with site.connect("w1") as worker, site.connect("d1") as device:
        device.on_up(connected.release)
        device.subscribe(session, lambda *_: wait_for(is_handled))
        assert connected.acquire(timeout=WAIT_S)
        worker.publish(session, b"hello", qos=1)
        time.sleep(0.5)  # the handler blocks the transport's thread
        device.reload_certificate()
        device.reload_certificate()
        is_handled.set()
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
    is_handled = threading.Event()
    with site.connect("w1") as worker, site.connect("d1") as device:
        device.subscribe(session, lambda *_: wait_for(is_handled))
        worker.publish(session, b"hello", qos=1)
        time.sleep(0.5)
        device.reload_certificate()
        device.close()
        is_handled.set()
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
        for reply in PromptClient(app).ask("d1", request, timeout_s=60):
            replies.append(reply)
            if reply.seq == 5:
                edge.reload_certificate()
    assert replies[-1].finish_reason == "length"
    assert len([reply for reply in replies if reply.token_id is not None]) == NUM_TOKENS
