"""The admission and the rights of each identity on real brokers."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import msgspec
import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from fleet.errors import LinkError
from fleet.identity.identity import Identity
from fleet.protocol import topics
from fleet.transport.base import Will
from fleet.transport.mqtt import MqttTransport
from provisioning.authority import CertificateAuthority
from tests.brokers import HOST, WAIT_S, Inbox, Site, wait_until
from tests.cloud_broker_worker.broker import raw

FORGED = b"forged"
MARKER = b"marker"


def device_to_worker(device: str, worker: str = "w1") -> str:
    return topics.to_worker(worker, device, "s1")


@contextmanager
def claiming(identity: Identity, client_id: str, *, clean: bool) -> Iterator[paho.Client]:
    """A hostile client: the certificate of `identity`, another client id and user name."""
    client = paho.Client(
        CallbackAPIVersion.VERSION2, client_id, clean_session=clean, protocol=paho.MQTTv311
    )
    client.tls_set_context(identity.ssl_context())
    client.username_pw_set(client_id)
    answered = threading.Event()
    client.on_connect = lambda *_: answered.set()
    client.on_disconnect = lambda *_: answered.set()
    client.connect(HOST, identity.config.port)
    client.loop_start()
    try:
        assert answered.wait(WAIT_S)
        yield client
    finally:
        client.disconnect()
        client.loop_stop()


def test_no_certificate_no_connection(site: Site) -> None:
    context = ssl.create_default_context(cafile=str(site.tls.ca_file))
    client = paho.Client(CallbackAPIVersion.VERSION2, "d1", protocol=paho.MQTTv311)
    client.tls_set_context(context)
    client.username_pw_set("d1")
    reasons: list[str] = []
    client.on_connect = lambda *_: reasons.append("connected")
    client.on_disconnect = lambda *_: reasons.append("disconnected")
    client.connect(HOST, site.port)
    while not reasons:
        client.loop(timeout=1.0)
    assert reasons == ["disconnected"]


def test_a_certificate_of_another_authority_is_refused(site: Site, tmp_path: Path) -> None:
    foreign = site.identity("d1", CertificateAuthority.create(tmp_path / "foreign"))
    (foreign.folder / "ca.pem").write_bytes(site.tls.ca_file.read_bytes())
    with pytest.raises(LinkError):
        MqttTransport.connect(foreign)


def test_the_brokers_own_certificate_is_no_clients(site: Site) -> None:
    identity = site.identity("d1")
    (identity.folder / "cert.pem").write_bytes(site.tls.cert_file.read_bytes())
    (identity.folder / "key.pem").write_bytes(site.tls.key_file.read_bytes())
    with pytest.raises(LinkError):
        MqttTransport.connect(identity)


def test_a_client_without_enrolment_cannot_connect(embedded_site: Site) -> None:
    with pytest.raises(LinkError, match="fleet enroll stranger"):
        MqttTransport.connect(embedded_site.identity("stranger"))


def test_a_client_without_enrolment_reaches_no_other_client(site: Site) -> None:
    inbox = Inbox()
    with site.connect("s1") as watcher, site.connect("d1") as device:
        watcher.subscribe(topics.DEVICE_STATUS_FILTER, inbox, qos=1)
        with (
            suppress(LinkError),
            MqttTransport.connect(site.identity("stranger")) as stranger,
        ):  # mosquitto admits it
            stranger.publish(topics.device_status("stranger"), FORGED, qos=1)
            stranger.publish(topics.device_status("d1"), FORGED, qos=1)
        device.publish(topics.device_status("d1"), MARKER, qos=1)
        assert inbox.until(MARKER) == []


@pytest.mark.parametrize("clean", [True, False], ids=["clean", "not clean"])
def test_using_anothers_client_id_harms_no_client(site: Site, clean: bool) -> None:
    inbox = Inbox()
    with site.connect("d1") as victim, site.connect("w1") as worker:
        victim.subscribe("ce/v1/d/d1/s/+", inbox, qos=1)
        with claiming(site.identity("d2"), "d1", clean=clean):
            worker.publish(topics.to_device("d1", "s1"), MARKER, qos=1)
            assert inbox.get()[1] == MARKER
        worker.publish(topics.to_device("d1", "s1"), b"still here", qos=1)
        assert inbox.get()[1] == b"still here"


@pytest.mark.parametrize("clean", [True, False], ids=["clean", "not clean"])
def test_taking_anothers_client_id_gives_none_of_its_rights(site: Site, clean: bool) -> None:
    inbox = Inbox()
    with site.connect("s1") as watcher, site.connect("d1") as victim:
        watcher.subscribe(topics.DEVICE_STATUS_FILTER, inbox, qos=1)
        with claiming(site.identity("d2"), "d1", clean=clean) as thief:
            thief.publish(topics.device_status("d1"), FORGED, qos=1)
            victim.publish(topics.device_status("d1"), MARKER, qos=1)
            assert inbox.until(MARKER) == []


def test_the_name_in_identity_json_cannot_be_anothers(embedded_site: Site) -> None:
    identity = embedded_site.identity("d2")
    disguised = replace(identity, config=msgspec.structs.replace(identity.config, name="d1"))
    with pytest.raises(LinkError, match="refuses d1"):
        MqttTransport.connect(disguised)


@pytest.mark.parametrize(
    ("forger", "topic", "reader", "topic_filter", "owner", "allowed"),
    [
        (
            "d2",
            topics.device_status("d1"),
            "s1",
            "ce/v1/d/+/status",
            "d1",
            topics.device_status("d1"),
        ),
        ("d2", topics.device_stats("d1"), "s1", "ce/v1/d/+/stats", "d1", topics.device_stats("d1")),
        (
            "d2",
            topics.device_reply("d1", "a1", "r1"),
            "a1",
            "ce/v1/d/+/reply/a1/+",
            "d1",
            topics.device_reply("d1", "a1", "r1"),
        ),
        (
            "d2",
            topics.open_session("d1"),
            "w1",
            topics.OPEN_FILTER,
            "d1",
            topics.open_session("d1"),
        ),
        ("d2", device_to_worker("d1"), "w1", "ce/v1/w/w1/+/+", "d1", device_to_worker("d1")),
        (
            "d2",
            topics.to_device("d1", "s1"),
            "d1",
            "ce/v1/d/d1/s/+",
            "w1",
            topics.to_device("d1", "s1"),
        ),
        (
            "a1",
            topics.device_prompt("d2", "a1", "r1"),
            "d2",
            "ce/v1/d/d2/prompt/+/+",
            "a2",
            topics.device_prompt("d2", "a2", "r1"),
        ),
        (
            "a1",
            topics.device_prompt("d1", "a2", "r1"),
            "d1",
            "ce/v1/d/d1/prompt/+/+",
            "a1",
            topics.device_prompt("d1", "a1", "r1"),
        ),
        (
            "a1",
            topics.device_cancel("d2", "a1", "r1"),
            "d2",
            "ce/v1/d/d2/cancel/+/+",
            "a2",
            topics.device_cancel("d2", "a2", "r1"),
        ),
        (
            "a1",
            topics.app_event("a2", "warmth"),
            "d2",
            "ce/v1/e/a2/+",
            "a2",
            topics.app_event("a2", "warmth"),
        ),
        (
            "d1",
            topics.app_event("a1", "warmth"),
            "d1",
            "ce/v1/e/a1/+",
            "a1",
            topics.app_event("a1", "warmth"),
        ),
        ("a1", "ce/v1/d/d1/config", "d1", "ce/v1/d/d1/config", "s1", "ce/v1/d/d1/config"),
        (
            "w1",
            topics.device_reported("d1"),
            "d1",
            "ce/v1/d/d1/reported",
            "s1",
            topics.device_reported("d1"),
        ),
        ("d1", "ce/v1/d/d1/config", "d1", "ce/v1/d/d1/config", "s1", "ce/v1/d/d1/config"),
        (
            "d1",
            topics.worker_status("w1"),
            "s1",
            topics.WORKER_STATUS_FILTER,
            "w1",
            topics.worker_status("w1"),
        ),
        (
            "w2",
            topics.worker_status("w1"),
            "d1",
            topics.WORKER_STATUS_FILTER,
            "w1",
            topics.worker_status("w1"),
        ),
        (
            "w1",
            topics.device_status("d1"),
            "s1",
            "ce/v1/d/+/status",
            "d1",
            topics.device_status("d1"),
        ),
        ("w2", device_to_worker("d1"), "w1", "ce/v1/w/w1/+/+", "d1", device_to_worker("d1")),
        ("d2", topics.REVOKED, "w1", topics.REVOKED, "s1", topics.REVOKED),
        ("w2", topics.REVOKED, "w1", topics.REVOKED, "s1", topics.REVOKED),
    ],
    ids=lambda value: value,
)
def test_no_client_publishes_in_anothers_place(
    site: Site, forger: str, topic: str, reader: str, topic_filter: str, owner: str, allowed: str
) -> None:
    inbox = Inbox()
    if forger == reader:
        with site.connect(forger) as both, site.connect(owner) as honest:
            both.subscribe(topic_filter, inbox, qos=1)
            both.publish(topic, FORGED, qos=1, retain=True)
            _wait_acknowledged(both)
            honest.publish(allowed, MARKER, qos=1)
            assert inbox.until(MARKER) == []
        return
    with site.connect(reader) as honest_reader, site.connect(owner) as honest:
        honest_reader.subscribe(topic_filter, inbox, qos=1)
        with site.connect(forger) as attacker:
            attacker.publish(topic, FORGED, qos=1, retain=True)
        honest.publish(allowed, MARKER, qos=1)
        assert inbox.until(MARKER) == []


def _wait_acknowledged(transport: MqttTransport) -> None:
    transport._unacknowledged[-1].wait_for_publish(WAIT_S)


@pytest.mark.parametrize(
    ("spy", "topic_filter", "sender", "secret", "marker_sender", "marker"),
    [
        (
            "d2",
            "ce/v1/d/d1/prompt/+/+",
            "a1",
            topics.device_prompt("d1", "a1", "r1"),
            "w1",
            topics.to_device("d2", "m"),
        ),
        (
            "d2",
            "ce/v1/d/+/prompt/+/+",
            "a1",
            topics.device_prompt("d1", "a1", "r1"),
            "w1",
            topics.to_device("d2", "m"),
        ),
        (
            "d2",
            "ce/v1/d/d1/s/+",
            "w1",
            topics.to_device("d1", "s1"),
            "w1",
            topics.to_device("d2", "m"),
        ),
        (
            "d2",
            "ce/v1/d/+/s/+",
            "w1",
            topics.to_device("d1", "s1"),
            "w1",
            topics.to_device("d2", "m"),
        ),
        ("d2", "ce/v1/#", "w1", topics.to_device("d1", "s1"), "w1", topics.to_device("d2", "m")),
        ("d2", "#", "w1", topics.to_device("d1", "s1"), "w1", topics.to_device("d2", "m")),
        (
            "d2",
            "$share/g/ce/v1/d/d1/s/+",
            "w1",
            topics.to_device("d1", "s1"),
            "w1",
            topics.to_device("d2", "m"),
        ),
        (
            "a2",
            "ce/v1/d/+/reply/a1/+",
            "d1",
            topics.device_reply("d1", "a1", "r1"),
            "d2",
            topics.device_reply("d2", "a2", "m"),
        ),
        (
            "a2",
            "ce/v1/d/d1/reply/+/+",
            "d1",
            topics.device_reply("d1", "a1", "r1"),
            "d2",
            topics.device_reply("d2", "a2", "m"),
        ),
        (
            "a1",
            "ce/v1/d/+/status",
            "d2",
            topics.device_status("d2"),
            "d1",
            topics.device_reply("d1", "a1", "m"),
        ),
        (
            "d2",
            "ce/v1/e/a1/+",
            "a1",
            topics.app_event("a1", "warmth"),
            "a2",
            topics.app_event("a2", "m"),
        ),
        (
            "d2",
            "ce/v1/e/+/+",
            "a1",
            topics.app_event("a1", "warmth"),
            "a2",
            topics.app_event("a2", "m"),
        ),
        (
            "a2",
            "ce/v1/e/a1/+",
            "a1",
            topics.app_event("a1", "warmth"),
            "d2",
            topics.device_reply("d2", "a2", "m"),
        ),
        (
            "a1",
            "ce/v1/d/d1/stats",
            "d1",
            topics.device_stats("d1"),
            "d1",
            topics.device_reply("d1", "a1", "m"),
        ),
        (
            "d2",
            topics.OPEN_FILTER,
            "d1",
            topics.open_session("d1"),
            "w1",
            topics.to_device("d2", "m"),
        ),
        ("d2", "ce/v1/w/+/+/+", "d1", device_to_worker("d1"), "w1", topics.to_device("d2", "m")),
        ("w2", "ce/v1/w/w1/+/+", "d1", device_to_worker("d1"), "d1", device_to_worker("d1", "w2")),
    ],
    ids=lambda value: value,
)
def test_no_client_reads_anothers_messages(
    site: Site,
    spy: str,
    topic_filter: str,
    sender: str,
    secret: str,
    marker_sender: str,
    marker: str,
) -> None:
    inbox = Inbox()
    with site.connect(spy) as reader, site.connect(sender) as honest:
        reader.subscribe(topic_filter, inbox, qos=1)
        reader.subscribe(marker, inbox, qos=1)
        honest.publish(secret, b"secret", qos=1, retain=True)
        _wait_acknowledged(honest)
        if marker_sender == sender:
            honest.publish(marker, MARKER, qos=1)
        else:
            with site.connect(marker_sender) as other:
                other.publish(marker, MARKER, qos=1)
        assert inbox.until(MARKER) == []


def test_a_will_reaches_no_topic_of_anothers(site: Site) -> None:
    inbox = Inbox()
    with site.connect("s1") as watcher, site.connect("d1") as victim:
        watcher.subscribe(topics.DEVICE_STATUS_FILTER, inbox, qos=1)
        with (
            suppress(LinkError),
            site.connect("d2", Will(topics.device_status("d1"), FORGED)) as attacker,
        ):
            sock = attacker._client.socket()
            assert isinstance(sock, socket.socket)
            sock.shutdown(socket.SHUT_RDWR)
            wait_until(lambda: not attacker.is_up, "the connection is cut")
        victim.publish(topics.device_status("d1"), MARKER, qos=1)
        assert inbox.until(MARKER) == []


def test_a_client_with_a_will_that_it_may_not_publish_is_admitted_by_each_broker(
    site: Site,
) -> None:
    with site.connect("a1", Will("homeassistant/status", b"offline")) as app:
        assert app.is_up


def test_the_will_of_an_app_cancels_its_request(site: Site) -> None:
    inbox = Inbox()
    cancel = topics.device_cancel("d1", "a1", "r1")
    with site.connect("d1") as device:
        device.subscribe(topics.cancels_to("d1"), inbox, qos=1, live_only=True)
        with raw.connected(site.identity("a1"), will=(cancel, b"")):
            assert inbox.is_empty
        assert inbox.get() == (cancel, b"")


def test_a_new_connection_is_sent_nothing_that_it_did_not_ask_for(site: Site) -> None:
    with site.connect("s1") as watcher, site.connect("d1") as device:
        watcher.subscribe(topics.DEVICE_STATUS_FILTER, Inbox(), qos=1)
        device.publish(topics.device_status("d1"), b"private", qos=1, retain=True)
        _wait_acknowledged(device)
        with raw.connected(site.identity("d2")) as sock:
            sock.sendall(raw.PINGREQ)
            assert raw.receive(sock, 2) == raw.PINGRESP
