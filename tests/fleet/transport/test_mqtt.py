"""The MQTT transport: errors of a failed connection, its socket and its limits."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import msgspec
import paho.mqtt.client as paho
import pytest

from benchmarks.proxy import LINGER_0
from fleet.errors import IdentityError, LinkError
from fleet.identity.identity import Identity
from fleet.protocol import topics
from fleet.transport.base import MAX_QUEUED
from fleet.transport.mqtt import MqttTransport, _TlsSocket
from provisioning.authority import CertificateAuthority
from tests.brokers import BROKERS, HOST, WAIT_S, Inbox, Site, free_port, running_site, wait_until


@pytest.fixture(params=BROKERS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    with running_site(request.param, tmp_path) as running:
        yield running


def at(identity: Identity, port: int, host: str = HOST) -> Identity:
    return replace(identity, config=msgspec.structs.replace(identity.config, host=host, port=port))


def test_nagles_algorithm_is_off(site: Site) -> None:
    with site.connect("d1") as device:
        sock = device._client.socket()
        assert isinstance(sock, socket.socket)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_flush_returns_when_the_message_has_gone_or_its_time_is_over(site: Site) -> None:
    with site.connect("d1") as device:
        device.flush(WAIT_S)  # without a message
        device.publish(topics.to_worker("w1", "d1", "s1"), b"x" * 100_000)
        device.flush(WAIT_S)
        assert device._newest_qos0
        assert device._newest_qos0.is_published()
        device._newest_qos0 = paho.MQTTMessageInfo(0)  # a message that is never sent
        device.flush(0.01)


def test_a_link_that_is_too_slow_refuses_messages_until_others_are_sent(site: Site) -> None:
    with site.connect("d1") as device:
        unsent = [paho.MQTTMessageInfo(number) for number in range(MAX_QUEUED)]
        device._unsent_qos0.extend(unsent)
        topic = topics.to_worker("w1", "d1", "s1")
        with pytest.raises(LinkError, match="messages of d1 already wait"):
            device.publish(topic, b"x")
        unsent[0]._set_as_published()
        unsent[1].rc = paho.MQTT_ERR_CONN_LOST
        device.publish(topic, b"x")
        assert len(device._unsent_qos0) == MAX_QUEUED - 1


def test_a_port_without_a_listener_is_named(site: Site) -> None:
    port = free_port()
    with pytest.raises(LinkError, match=rf"127\.0\.0\.1:{port}: no server listens there; start it"):
        MqttTransport.connect(at(site.identity("d1"), port))


def test_an_unknown_host_is_named(site: Site) -> None:
    with pytest.raises(LinkError, match="no such host"):
        MqttTransport.connect(at(site.identity("d1"), site.port, "broker.invalid"))


def test_a_broker_of_another_fleet_is_not_trusted(site: Site, tmp_path: Path) -> None:
    foreign = CertificateAuthority.create(tmp_path / "foreign")
    with pytest.raises(LinkError, match="not trusted"):
        MqttTransport.connect(site.identity("d1", foreign))


def test_a_clock_that_is_ahead_gets_the_advice_of_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_site("embedded", tmp_path) as site:
        site.broker.stop()
        with monkeypatch.context() as patch:
            patch.setattr("provisioning.authority.LEAF_LIFE", timedelta(0))
            site.authority.server_tls(tmp_path / "server", HOST)
        site.broker.start()
        with pytest.raises(LinkError, match="set the clock if it is wrong, else the fleet's"):
            MqttTransport.connect(site.identity("d1"))


def test_a_device_whose_clock_is_set_connects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_site("embedded", tmp_path) as site:
        site.broker.stop()
        with monkeypatch.context() as patch:
            patch.setattr("provisioning.authority.CLOCK_SKEW", timedelta(days=-1))
            site.authority.server_tls(tmp_path / "server", HOST)
        site.broker.start()
        with MqttTransport.connect(site.identity("d1"), wait=False) as device:
            assert not device.wait_up(threading.Event(), 1.5)
            site.broker.stop()
            site.authority.server_tls(tmp_path / "server", HOST)  # as valid as by the right clock
            site.broker.start()
            assert device.wait_up(threading.Event(), WAIT_S)


def test_a_clock_that_is_behind_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "provisioning.authority.CLOCK_SKEW", timedelta(days=-1)
    )  # valid from tomorrow on
    with (
        running_site("embedded", tmp_path) as site,
        pytest.raises(LinkError, match="set the clock"),
    ):
        site.connect("d1")


def test_a_certificate_of_another_fleet_is_refused_with_the_next_step(
    site: Site, tmp_path: Path
) -> None:
    foreign = site.identity("d1", CertificateAuthority.create(tmp_path / "foreign"))
    (foreign.folder / "ca.pem").write_bytes(site.tls.ca_file.read_bytes())
    with pytest.raises(LinkError, match="or enroll it again"):
        MqttTransport.connect(foreign)


def test_a_server_that_does_not_answer_ends_the_wait(site: Site) -> None:
    with socket.create_server((HOST, 0)) as mute:
        identity = at(site.identity("d1"), mute.getsockname()[1])
        with pytest.raises(LinkError, match="did not respond"):
            MqttTransport.connect(identity, timeout_s=0.3)


def test_a_server_that_speaks_no_tls_is_named(site: Site) -> None:
    with socket.create_server((HOST, 0)) as plain:

        def greet() -> None:
            connection, _ = plain.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.recv(1000)

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(LinkError, match="TLS failed"):
            MqttTransport.connect(at(site.identity("d1"), plain.getsockname()[1]))
        thread.join(WAIT_S)


def test_a_connection_that_is_reset_before_tls_begins_is_closed(site: Site) -> None:
    context = site.identity("d1").ssl_context()
    context.sslsocket_class = _TlsSocket
    with socket.create_server((HOST, 0)) as server:
        client = socket.create_connection(server.getsockname())
        connection, _ = server.accept()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
        connection.close()
        with pytest.raises(ConnectionResetError):  # and no ResourceWarning, which is an error here
            context.wrap_socket(client, server_hostname=HOST, do_handshake_on_connect=False)


def test_a_broken_certificate_is_an_identity_error(site: Site) -> None:
    identity = site.identity("d1")
    (identity.folder / "cert.pem").write_text("no certificate")
    with pytest.raises(IdentityError, match="join again"):
        MqttTransport.connect(identity)


def test_without_waiting_it_connects_as_soon_as_the_broker_is_there(site: Site) -> None:
    site.broker.stop()
    announced = threading.Event()
    with MqttTransport.connect(site.identity("d1"), wait=False) as device:
        device.on_up(announced.set)
        assert not device.is_up
        site.broker.start()
        assert announced.wait(WAIT_S)


def test_a_wait_ends_when_the_broker_is_there_or_the_process_is_stopped(site: Site) -> None:
    site.broker.stop()
    stop = threading.Event()
    with MqttTransport.connect(site.identity("d1"), wait=False) as device:
        assert not device.wait_up(stop, timeout_s=0.1)
        site.broker.start()
        assert device.wait_up(stop)
    site.broker.stop()
    stop.set()
    with MqttTransport.connect(site.identity("d1"), wait=False) as device:
        assert not device.wait_up(stop)
    site.broker.start()


def test_a_start_before_the_broker_is_logged_once(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "fleet.transport.mqtt")
    site.broker.stop()
    with MqttTransport.connect(site.identity("d1"), wait=False) as device:
        time.sleep(2.5)  # several attempts
        site.broker.start()
        assert device.wait_up(threading.Event(), WAIT_S)
    lines = [each for each in caplog.messages if each.startswith(("no connection of d1", "d1 "))]
    assert [each.split(f":{site.port}")[1] for each in lines] == [
        ": no server listens there; start it with 'fleet up', or correct host and port in "
        "identity.json; trying again",
        "",
    ]


def test_a_lost_link_and_its_return_are_one_line_each(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "fleet.transport.mqtt")
    with site.connect("d1") as device:
        site.broker.stop()
        wait_until(lambda: not device.is_up, "the link is lost")
        time.sleep(1.5)
        site.broker.start()
        assert device.wait_up(threading.Event(), WAIT_S)
    lines = [each for each in caplog.messages if each.startswith(("no connection of d1", "d1 "))]
    assert [each.split(" broker")[0] for each in lines] == [
        "d1 lost its link to the",
        "d1 is connected to the",
    ]


def test_a_new_certificate_is_no_loss_of_the_link(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "fleet.transport.mqtt")
    with site.connect("d1") as device:
        device.reload_certificate()
        assert device.wait_up(threading.Event(), WAIT_S)
    assert [each for each in caplog.messages if each.startswith("d1 ")] == []


def test_a_message_of_a_quarter_megabyte_passes(site: Site) -> None:
    inbox = Inbox()
    payload = bytes(range(256)) * 1024
    with site.connect("w1") as worker, site.connect("d1") as device:
        worker.subscribe("ce/v1/w/w1/+/+", inbox)
        device.publish(topics.to_worker("w1", "d1", "s1"), payload)
        assert inbox.get() == (topics.to_worker("w1", "d1", "s1"), payload)


def test_messages_published_before_closing_arrive(site: Site) -> None:
    inbox = Inbox()
    with site.connect("s1") as watcher:
        watcher.subscribe(topics.DEVICE_STATS_FILTER, inbox, qos=1)
        with site.connect("d1") as device:
            for i in range(300):
                device.publish(topics.device_stats("d1"), b"%d" % i, qos=1)
        assert inbox.until(b"299") == [b"%d" % i for i in range(299)]


def test_a_closed_transport_leaves_no_thread(site: Site) -> None:
    device = site.connect("d1")
    device.close()
    wait_until(
        lambda: not any("paho" in thread.name for thread in threading.enumerate()),
        "paho's thread ended",
    )
