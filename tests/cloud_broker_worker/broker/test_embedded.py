"""The embedded broker: hostile, broken, slow and silent clients; its start and end."""

from __future__ import annotations

import gc
import logging
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from cloud_broker_worker.broker import connection as connection_module
from cloud_broker_worker.broker.embedded import EmbeddedBroker
from cloud_broker_worker.broker.fleet_broker import MAX_CONNECTIONS_PER_NAME, MAX_FILTERS
from fleet.errors import ConfigError, IdentityError, LinkError
from fleet.identity.identity import ServerTls
from fleet.protocol import topics
from fleet.protocol.access import Grants
from fleet.transport.base import MAX_PACKET_BYTES, Will
from tests.brokers import HOST, WAIT_S, Inbox, Site, wait_until
from tests.cloud_broker_worker.broker import raw

STATUS = topics.device_status("d1")
SESSION = topics.to_device("d1", "s1")


def test_a_busy_port_is_named_with_the_next_step(amqtt_site: Site) -> None:
    with (
        pytest.raises(
            ConfigError,
            match=rf"127\.0\.0\.1:{amqtt_site.port}: the port is in use; stop what uses it",
        ),
        EmbeddedBroker(HOST, amqtt_site.port, amqtt_site.tls, amqtt_site.lookup),
    ):
        pass


def test_a_missing_certificate_is_named(amqtt_site: Site, tmp_path: Path) -> None:
    tls = ServerTls(amqtt_site.tls.ca_file, tmp_path / "absent.pem", amqtt_site.tls.key_file)
    with (
        pytest.raises(IdentityError, match=r"absent\.pem"),
        EmbeddedBroker(HOST, 0, tls, amqtt_site.lookup),
    ):
        pass


def test_port_zero_chooses_a_free_one(amqtt_site: Site) -> None:
    with EmbeddedBroker(HOST, 0, amqtt_site.tls, amqtt_site.lookup) as broker:
        assert broker.port not in (0, amqtt_site.port)


def test_it_ends_while_clients_are_connected_and_leaves_no_thread(amqtt_site: Site) -> None:
    with ExitStack() as stack:
        stack.enter_context(raw.tls_socket(amqtt_site.identity("d1")))
        stack.enter_context(raw.connected(amqtt_site.identity("d2")))
        amqtt_site.broker.stop()
        assert not any(thread.name == "broker" for thread in threading.enumerate())
    gc.collect()


def test_it_sends_no_wills_when_it_ends(amqtt_site: Site, caplog: pytest.LogCaptureFixture) -> None:
    inbox = Inbox()
    with amqtt_site.connect("s1") as watcher, amqtt_site.connect("d1", Will(STATUS, b"dead")):
        watcher.subscribe(STATUS, inbox, qos=1)
        with caplog.at_level(logging.WARNING):
            amqtt_site.broker.stop()
        assert inbox.is_empty
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_nagles_algorithm_is_off(amqtt_site: Site) -> None:
    with raw.connected(amqtt_site.identity("d1")) as client:
        accepted = [
            sock
            for sock in gc.get_objects()
            if type(sock) is socket.socket
            and sock.fileno() >= 0
            and _peer(sock) == client.getsockname()
        ]
        assert [
            bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)) for sock in accepted
        ] == [True]


def _peer(sock: socket.socket) -> object:
    try:
        return sock.getpeername()
    except OSError:
        return None


def test_importing_it_does_not_import_amqtt() -> None:
    code = "import cloud_broker_worker.broker.embedded, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"amqtt", "torch", "cloud_broker_worker.worker"}
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("packet", "answer"),
    [
        (raw.connect("d2"), raw.REFUSED),
        (raw.connect("stranger"), raw.REFUSED),
        (raw.connect("d1/extra"), raw.REFUSED),
        (raw.connect("d1", will=(topics.device_status("d2"), b"dead")), raw.REFUSED),
        (raw.connect("d1", level=5), raw.WRONG_VERSION),
        (raw.connect("d1", level=3), raw.WRONG_VERSION),
        (raw.PINGREQ, raw.REFUSED),
        (raw.publish(STATUS, b"early"), raw.REFUSED),
        (b"GET / HTTP/1.1\r\nHost: broker\r\n\r\n", b""),
        (b"\x10\x00", b""),
        (b"\x10\xff\xff\xff\xff\x7f", b""),
        (b"\x10" + raw.length(MAX_PACKET_BYTES), b""),
        (b"\xf0\x00", b""),
    ],
    ids=repr,
)
def test_a_wrong_first_packet_is_answered_and_the_connection_closed(
    amqtt_site: Site, packet: bytes, answer: bytes
) -> None:
    with raw.tls_socket(amqtt_site.identity("d1")) as sock:
        sock.sendall(packet)
        assert raw.receive(sock, 5) == answer


@pytest.mark.parametrize(
    "packet",
    [
        b"\x30" + raw.length(MAX_PACKET_BYTES + 1),
        b"\x30\xff\xff\xff\xff\x01",
        raw.packet(0x30, (1000).to_bytes(2) + b"short"),
        raw.publish("ce/v1/d/d1/#", b"wildcard"),
        raw.publish("ce/v1/d/d1/" + "x" * 300, b"long topic"),
        raw.publish(STATUS, b"exactly once", qos=2),
        raw.packet(0x36, raw.string(STATUS.encode()) + b"\x00\x01 no such QoS"),
        raw.connect("d1"),
        b"\x20\x02\x00\x00",
        b"\xf0\x00",
    ],
    ids=lambda packet: repr(packet[:24]),
)
def test_a_broken_packet_ends_only_its_senders_connection(
    amqtt_site: Site, packet: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    inbox = Inbox()
    with amqtt_site.connect("w1") as worker, amqtt_site.connect("d2") as other:
        worker.subscribe(topics.OPEN_FILTER, inbox)
        with raw.connected(amqtt_site.identity("d1")) as sock:
            sock.sendall(packet)
            assert raw.is_closed(sock)
        other.publish(topics.open_session("d2"), b"fine")
        assert inbox.get()[1] == b"fine"
    assert not [record for record in caplog.records if record.exc_info]


def test_the_largest_packet_passes(amqtt_site: Site) -> None:
    inbox = Inbox()
    topic = topics.to_worker("w1", "d1", "s1")
    payload = bytes(MAX_PACKET_BYTES - 2 - len(topic))
    with amqtt_site.connect("w1") as worker, amqtt_site.connect("d1") as device:
        worker.subscribe("ce/v1/w/w1/+/+", inbox)
        device.publish(topic, payload)
        assert len(inbox.get()[1]) == len(payload)


def test_a_client_that_falls_silent_is_disconnected_and_its_will_sent(amqtt_site: Site) -> None:
    inbox = Inbox()
    with amqtt_site.connect("s1") as watcher:
        watcher.subscribe(STATUS, inbox, qos=1)
        with raw.connected(
            amqtt_site.identity("d1"), keep_alive_s=1, will=(STATUS, b"dead")
        ) as sock:
            assert inbox.get() == (STATUS, b"dead")
            assert raw.is_closed(sock)


def test_a_client_that_pings_stays(amqtt_site: Site) -> None:
    with raw.connected(amqtt_site.identity("d1"), keep_alive_s=1) as sock:
        for _ in range(8):
            sock.sendall(raw.PINGREQ)
            assert raw.receive(sock, 2) == raw.PINGRESP
            threading.Event().wait(0.3)


def test_a_second_connection_of_a_name_replaces_the_first_and_the_old_will_is_not_sent(
    amqtt_site: Site,
) -> None:
    seen = Inbox()
    inbox = Inbox()
    identity = amqtt_site.identity("d1")
    with amqtt_site.connect("s1") as watcher, amqtt_site.connect("w1") as worker:
        watcher.subscribe(STATUS, seen, qos=1)
        with (
            raw.connected(identity, will=(STATUS, b"dead")) as old,
            amqtt_site.connect("d1") as new,
        ):
            new.subscribe("ce/v1/d/d1/s/+", inbox)
            assert raw.is_closed(old)
            worker.publish(SESSION, b"to the new one")
            assert inbox.get()[1] == b"to the new one"
            new.publish(STATUS, b"born", qos=1)
            assert seen.until(b"born") == []


def test_a_taken_over_connection_gets_nothing_published_any_more(amqtt_site: Site) -> None:
    identity = amqtt_site.identity("d1")
    with raw.connected(identity) as old, raw.connected(identity) as new:
        assert raw.is_closed(old)
        new.sendall(raw.PINGREQ)
        assert raw.receive(new, 2) == raw.PINGRESP


def test_a_subscriber_that_does_not_read_blocks_no_other_client(
    amqtt_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "MAX_UNSENT_BYTES", 1 << 20)
    inbox = Inbox()
    payload = bytes(100_000)
    with (
        amqtt_site.connect("w1") as worker,
        amqtt_site.connect("d2") as healthy,
        raw.connected(amqtt_site.identity("d1")) as stuck,
    ):
        stuck.sendall(raw.subscribe("ce/v1/d/d1/s/+"))
        assert raw.receive(stuck, 5) == b"\x90\x03\x00\x01\x00"
        healthy.subscribe("ce/v1/d/d2/s/+", inbox)
        for i in range(200):
            worker.publish(SESSION, payload)
            worker.publish(topics.to_device("d2", "s1"), b"%d" % i)
        assert inbox.until(b"199") == [b"%d" % i for i in range(199)]


def test_a_subscriber_that_does_not_read_qos_1_is_disconnected(
    amqtt_site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection_module, "MAX_UNSENT_BYTES", 1 << 20)
    with (
        amqtt_site.connect("a1") as app,
        raw.connected(amqtt_site.identity("d1")) as stuck,
        caplog.at_level(logging.WARNING),
    ):
        stuck.sendall(raw.subscribe("ce/v1/d/d1/prompt/+/+", qos=1))
        raw.receive(stuck, 5)
        for i in range(150):
            app.publish(topics.device_prompt("d1", "a1", f"r{i}"), bytes(100_000), qos=1)
        wait_until(
            lambda: "d1 is disconnected: it reads too slowly" in caplog.text, "d1 is put out"
        )


def test_a_client_whose_enrolment_ended_is_disconnected(amqtt_site: Site) -> None:
    with raw.connected(amqtt_site.identity("d1")) as sock:
        del amqtt_site.known["d1"]
        assert raw.is_closed(sock)
    with pytest.raises(LinkError, match="Not authorized"):
        amqtt_site.connect("d1")


def test_a_registry_that_fails_admits_no_client(
    amqtt_site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_name: str, _fingerprint: str) -> Grants | None:
        raise OSError("the database is gone")

    with EmbeddedBroker(HOST, 0, amqtt_site.tls, broken) as broker:
        amqtt_site.port = broker.port
        with pytest.raises(LinkError, match="Not authorized"):
            amqtt_site.connect("d1")
    assert "the database is gone" in caplog.text


def test_one_name_has_a_limit_of_connections(amqtt_site: Site) -> None:
    identity = amqtt_site.identity("a1")
    with ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS_PER_NAME):
            sock = stack.enter_context(raw.tls_socket(identity))
            sock.sendall(raw.connect(""))
            assert raw.receive(sock, 4) == raw.ACCEPTED
        one_more = stack.enter_context(raw.tls_socket(identity))
        one_more.sendall(raw.connect(""))
        assert raw.receive(one_more, 4) == raw.REFUSED


def test_one_connection_has_a_limit_of_subscriptions(amqtt_site: Site) -> None:
    with raw.connected(amqtt_site.identity("d1")) as sock:
        codes = []
        for i in range(MAX_FILTERS + 1):
            sock.sendall(raw.subscribe(topics.to_device("d1", f"s{i}")))
            codes.append(raw.receive(sock, 5)[-1])
    assert codes == [0] * MAX_FILTERS + [0x80]


def test_overlapping_subscriptions_bring_a_message_once(amqtt_site: Site) -> None:
    with amqtt_site.connect("w1") as worker, raw.connected(amqtt_site.identity("d1")) as sock:
        for topic_filter in (SESSION, "ce/v1/d/d1/s/+"):
            sock.sendall(raw.subscribe(topic_filter))
            raw.receive(sock, 5)
        worker.publish(SESSION, b"once")
        worker.publish(SESSION, b"next")
        wanted = raw.publish(SESSION, b"once") + raw.publish(SESSION, b"next")
        assert raw.receive(sock, len(wanted)) == wanted


@pytest.mark.parametrize("request_name", ["r1", "status", "config", "revoked"])
def test_only_status_and_config_are_kept_for_later(amqtt_site: Site, request_name: str) -> None:
    inbox = Inbox()
    topic = topics.device_reply("d1", "a1", request_name)
    with amqtt_site.connect("d1") as device, amqtt_site.connect("a1") as app:
        device.publish(topic, b"kept for ever", qos=1, retain=True)
        app.subscribe("ce/v1/d/d1/status", inbox, qos=1)
        device.publish(STATUS, b"born", qos=1, retain=True)
        assert inbox.get()[1] == b"born"
        app.subscribe(topic, inbox, qos=1)
        device.publish(topic, b"marker", qos=1)
        assert inbox.until(b"marker") == []


def test_many_messages_from_many_devices_reach_the_worker_in_each_ones_order(
    amqtt_site: Site,
) -> None:
    inbox = Inbox()
    with amqtt_site.connect("w1") as worker, ExitStack() as stack:
        worker.subscribe("ce/v1/w/w1/+/+", inbox)
        devices = [stack.enter_context(amqtt_site.connect(name)) for name in ("d1", "d2")]

        def send(device_index: int) -> None:
            device = devices[device_index]
            for i in range(500):
                device.publish(topics.to_worker("w1", device.name, "s1"), b"%d" % i)

        threads = [threading.Thread(target=send, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        got: dict[str, list[bytes]] = {"d1": [], "d2": []}
        for _ in range(1000):
            topic, payload = inbox.get()
            got[topic.split("/")[4]].append(payload)
        for thread in threads:
            thread.join(WAIT_S)
    assert got == {name: [b"%d" % i for i in range(500)] for name in ("d1", "d2")}


def test_a_silent_connection_delays_no_other_client(amqtt_site: Site) -> None:
    with (
        socket.create_connection((HOST, amqtt_site.port)),
        raw.tls_socket(amqtt_site.identity("d2")),
    ):
        amqtt_site.connect("d1").close()
