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

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from cloud_broker_worker.broker import connection as connection_module
from cloud_broker_worker.broker import fleet_broker
from cloud_broker_worker.broker.embedded import EmbeddedBroker
from cloud_broker_worker.broker.fleet_broker import (
    MAX_CONNECTIONS_PER_NAME,
    MAX_FILTERS,
    RATES,
)
from cloud_broker_worker.broker.token_bucket import PacketBudget, TokenRate
from fleet.errors import ConfigError, IdentityError, LinkError
from fleet.identity.identity import ServerTls
from fleet.protocol import topics
from fleet.protocol.access import Action, Grants, Role
from fleet.transport.base import MAX_PACKET_BYTES, Will
from tests.brokers import HOST, WAIT_S, Inbox, LookupRegistry, Site, wait_until
from tests.cloud_broker_worker.broker import raw

STATUS = topics.device_status("d1")
SESSION = topics.to_device("d1", "s1")


def test_a_busy_port_is_named_with_the_next_step(embedded_site: Site) -> None:
    with (
        pytest.raises(
            ConfigError,
            match=rf"127\.0\.0\.1:{embedded_site.port}: the port is in use; stop what uses it",
        ),
        EmbeddedBroker(
            HOST, embedded_site.port, embedded_site.tls, LookupRegistry(embedded_site.lookup)
        ),
    ):
        pass


def test_a_missing_certificate_is_named(embedded_site: Site, tmp_path: Path) -> None:
    tls = ServerTls(embedded_site.tls.ca_file, tmp_path / "absent.pem", embedded_site.tls.key_file)
    with (
        pytest.raises(IdentityError, match=r"absent\.pem"),
        EmbeddedBroker(HOST, 0, tls, LookupRegistry(embedded_site.lookup)),
    ):
        pass


def test_port_zero_chooses_a_free_one(embedded_site: Site) -> None:
    with EmbeddedBroker(HOST, 0, embedded_site.tls, LookupRegistry(embedded_site.lookup)) as broker:
        assert broker.port not in (0, embedded_site.port)


def test_it_ends_while_clients_are_connected_and_leaves_no_thread(embedded_site: Site) -> None:
    with ExitStack() as stack:
        stack.enter_context(raw.tls_socket(embedded_site.identity("d1")))
        stack.enter_context(raw.connected(embedded_site.identity("d2")))
        embedded_site.broker.stop()
        assert not any(thread.name == "broker" for thread in threading.enumerate())
    gc.collect()


def test_it_sends_no_wills_when_it_ends(
    embedded_site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    inbox = Inbox()
    with embedded_site.connect("s1") as watcher, embedded_site.connect("d1", Will(STATUS, b"dead")):
        watcher.subscribe(STATUS, inbox, qos=1)
        with caplog.at_level(logging.WARNING):
            embedded_site.broker.stop()
        assert inbox.is_empty
    warnings = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert not [each for each in warnings if each.name.startswith("cloud_broker_worker")]


def test_nagles_algorithm_is_off(embedded_site: Site) -> None:
    with raw.connected(embedded_site.identity("d1")) as client:
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


def test_importing_it_imports_no_worker() -> None:
    code = "import cloud_broker_worker.broker.embedded, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "cloud_broker_worker.worker"}
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("packet", "answer"),
    [
        (raw.connect("d2"), raw.REFUSED),
        (raw.connect("stranger"), raw.REFUSED),
        (raw.connect("d1/extra"), raw.REFUSED),
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
    embedded_site: Site, packet: bytes, answer: bytes
) -> None:
    with raw.tls_socket(embedded_site.identity("d1")) as sock:
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
    embedded_site: Site, packet: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    inbox = Inbox()
    with embedded_site.connect("w1") as worker, embedded_site.connect("d2") as other:
        worker.subscribe(topics.OPEN_FILTER, inbox)
        with raw.connected(embedded_site.identity("d1")) as sock:
            sock.sendall(packet)
            assert raw.is_closed(sock)
        other.publish(topics.open_session("d2"), b"fine")
        assert inbox.get()[1] == b"fine"
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize(
    ("packet", "line"),
    [
        (raw.publish(STATUS, b"exactly once", qos=2), "expected QoS 0 or 1, got QoS 2"),
        (raw.packet(0x30, raw.string(b"ce/v1/d/d1/\xff")), "expected UTF-8"),
        (raw.packet(0x30, raw.string(b"ce/v1/d/d1/\0")), "without U+0000"),
        (raw.packet(0x82, b"\0\1" + raw.string(b"ce/v1/d/d1/\0") + b"\0"), "without U+0000"),
        (raw.subscribe_all([SESSION] * 53_000), "at most 1000 filters"),
        (raw.unsubscribe_all([SESSION] * 53_000), "at most 1000 filters"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_client_that_breaks_the_protocol_is_named_with_the_reason_in_one_line(
    embedded_site: Site, packet: bytes, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    with raw.connected(embedded_site.identity("d1")) as sock:
        sock.sendall(packet)
        assert raw.is_closed(sock)
    (message,) = (record.message for record in caplog.records if line in record.message)
    assert "connection of d1 ended" in message


def test_a_client_of_mqtt_5_is_refused_with_the_reason_in_the_log(
    embedded_site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    client = paho.Client(CallbackAPIVersion.VERSION2, "d1", protocol=paho.MQTTv5)
    client.tls_set_context(embedded_site.identity("d1").ssl_context())
    reasons: list[str] = []
    client.on_connect = lambda *arguments: reasons.append(str(arguments[3]))
    client.connect(HOST, embedded_site.port)
    while not reasons:
        client.loop(timeout=1.0)
    assert reasons == ["Unsupported protocol version"]
    assert "expected MQTT 3.1.1, got MQTT 5; choose version 3.1.1" in caplog.text


def test_a_filter_that_is_repeated_brings_its_retained_message_once(embedded_site: Site) -> None:
    with embedded_site.connect("d1") as device, raw.connected(embedded_site.identity("a1")) as app:
        device.publish(STATUS, b"born", qos=1, retain=True)
        _wait_retained(embedded_site)
        app.sendall(raw.subscribe_all([STATUS] * 500) + raw.PINGREQ)
        assert raw.receive(app, 505) == b"\x90\xf6\x03\x00\x01" + bytes(500)
        head = len(raw.publish(STATUS, b"born"))
        assert raw.receive(app, head)[-4:] == b"born"
        assert raw.receive(app, 2) == raw.PINGRESP


def _wait_retained(site: Site) -> None:
    """Wait until the status of d1 is retained."""
    inbox = Inbox()
    with site.connect("s1") as watcher:
        watcher.subscribe(STATUS, inbox, qos=1)
        inbox.get()


def test_a_repeated_filter_is_checked_once(
    embedded_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    permits = Grants.permits

    def counting(self: Grants, action: Action, topic: str) -> bool:
        checked.append(topic)
        return permits(self, action, topic)

    with raw.connected(embedded_site.identity("d1")) as sock:
        monkeypatch.setattr(Grants, "permits", counting)
        sock.sendall(raw.subscribe_all([SESSION] * 1_000))
        raw.receive(sock, 1_005)
        sock.sendall(raw.unsubscribe_all([SESSION] * 1_000))
        assert raw.receive(sock, 4) == b"\xb0\x02\x00\x01"
    assert checked == [SESSION]


def test_a_client_with_a_will_that_it_may_not_publish_is_admitted_and_the_will_is_dropped(
    embedded_site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    inbox = Inbox()
    with embedded_site.connect("s1") as watcher:
        watcher.subscribe(topics.DEVICE_STATUS_FILTER, inbox, qos=1)
        identity = embedded_site.identity("a1")
        with raw.connected(identity, will=("homeassistant/status", b"offline")):
            pass
        wait_until(
            lambda: "a1 may not publish its will to homeassistant/status" in caplog.text,
            "the will is refused",
        )
        with raw.connected(embedded_site.identity("d2"), will=(STATUS, b"forged")):
            pass
        with embedded_site.connect("d1") as device:
            device.publish(STATUS, b"born", qos=1)
            assert inbox.until(b"born") == []


def test_a_client_that_publishes_without_a_pause_is_held_back_and_loses_nothing(
    embedded_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    spend = PacketBudget.spend

    def recording(self: PacketBudget, cost: float) -> float:
        waits.append(spend(self, cost))
        return waits[-1]

    monkeypatch.setattr(PacketBudget, "spend", recording)
    monkeypatch.setitem(RATES, Role.DEVICE, TokenRate(per_s=1_000, burst=10))
    inbox = Inbox()
    with (
        embedded_site.connect("w1") as worker,
        raw.connected(embedded_site.identity("d1")) as device,
    ):
        worker.subscribe("ce/v1/w/w1/+/+", inbox)
        topic = topics.to_worker("w1", "d1", "s1")
        device.sendall(b"".join(raw.publish(topic, b"%d" % i) for i in range(100)))
        assert inbox.until(b"99") == [b"%d" % i for i in range(99)]
    assert max(waits) > 0.0


def test_messages_for_many_subscribers_cost_more_than_for_one() -> None:
    assert fleet_broker._cost(1, 0) == 1
    assert fleet_broker._cost(1, 300) == 16


def test_it_listens_on_ipv6(embedded_site: Site) -> None:
    tls = embedded_site.authority.server_tls(embedded_site.folder / "server6", "::1")
    context = embedded_site.identity("d1").ssl_context()
    with (
        EmbeddedBroker("::1", 0, tls, LookupRegistry(embedded_site.lookup)) as broker,
        socket.create_connection(("::1", broker.port), WAIT_S) as plain,
        context.wrap_socket(plain, server_hostname="::1") as sock,
    ):
        sock.sendall(raw.connect("d1"))
        assert raw.receive(sock, 4) == raw.ACCEPTED


def test_the_largest_packet_passes(embedded_site: Site) -> None:
    inbox = Inbox()
    topic = topics.to_worker("w1", "d1", "s1")
    payload = bytes(MAX_PACKET_BYTES - 2 - len(topic))
    with embedded_site.connect("w1") as worker, embedded_site.connect("d1") as device:
        worker.subscribe("ce/v1/w/w1/+/+", inbox)
        device.publish(topic, payload)
        assert len(inbox.get()[1]) == len(payload)


def test_a_client_that_falls_silent_is_disconnected_and_its_will_sent(embedded_site: Site) -> None:
    inbox = Inbox()
    with embedded_site.connect("s1") as watcher:
        watcher.subscribe(STATUS, inbox, qos=1)
        with raw.connected(
            embedded_site.identity("d1"), keep_alive_s=1, will=(STATUS, b"dead")
        ) as sock:
            assert inbox.get() == (STATUS, b"dead")
            assert raw.is_closed(sock)


def test_a_client_that_pings_stays(embedded_site: Site) -> None:
    with raw.connected(embedded_site.identity("d1"), keep_alive_s=1) as sock:
        for _ in range(8):
            sock.sendall(raw.PINGREQ)
            assert raw.receive(sock, 2) == raw.PINGRESP
            threading.Event().wait(0.3)


def test_a_second_connection_of_a_name_replaces_the_first_and_the_old_will_is_not_sent(
    embedded_site: Site,
) -> None:
    seen = Inbox()
    inbox = Inbox()
    identity = embedded_site.identity("d1")
    with embedded_site.connect("s1") as watcher, embedded_site.connect("w1") as worker:
        watcher.subscribe(STATUS, seen, qos=1)
        with (
            raw.connected(identity, will=(STATUS, b"dead")) as old,
            embedded_site.connect("d1") as new,
        ):
            new.subscribe("ce/v1/d/d1/s/+", inbox)
            assert raw.is_closed(old)
            worker.publish(SESSION, b"to the new one")
            assert inbox.get()[1] == b"to the new one"
            new.publish(STATUS, b"born", qos=1)
            assert seen.until(b"born") == []


def test_a_taken_over_connection_gets_nothing_published_any_more(embedded_site: Site) -> None:
    identity = embedded_site.identity("d1")
    with raw.connected(identity) as old, raw.connected(identity) as new:
        assert raw.is_closed(old)
        new.sendall(raw.PINGREQ)
        assert raw.receive(new, 2) == raw.PINGRESP


def test_a_subscriber_that_does_not_read_blocks_no_other_client(
    embedded_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "MAX_UNSENT_BYTES", 1 << 20)
    inbox = Inbox()
    payload = bytes(100_000)
    with (
        embedded_site.connect("w1") as worker,
        embedded_site.connect("d2") as healthy,
        raw.connected(embedded_site.identity("d1")) as stuck,
    ):
        stuck.sendall(raw.subscribe("ce/v1/d/d1/s/+"))
        assert raw.receive(stuck, 5) == b"\x90\x03\x00\x01\x00"
        healthy.subscribe("ce/v1/d/d2/s/+", inbox)
        for i in range(200):
            worker.publish(SESSION, payload)
            worker.publish(topics.to_device("d2", "s1"), b"%d" % i)
        assert inbox.until(b"199") == [b"%d" % i for i in range(199)]


def test_a_subscriber_that_does_not_read_qos_1_is_disconnected(
    embedded_site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection_module, "MAX_UNSENT_BYTES", 1 << 20)
    with (
        embedded_site.connect("a1") as app,
        raw.connected(embedded_site.identity("d1")) as stuck,
        caplog.at_level(logging.WARNING),
    ):
        stuck.sendall(raw.subscribe("ce/v1/d/d1/prompt/+/+", qos=1))
        raw.receive(stuck, 5)
        for i in range(150):
            app.publish(topics.device_prompt("d1", "a1", f"r{i}"), bytes(100_000), qos=1)
        wait_until(
            lambda: "d1 is disconnected: it reads too slowly" in caplog.text, "d1 is put out"
        )


def test_a_client_whose_enrolment_ended_is_disconnected(embedded_site: Site) -> None:
    with raw.connected(embedded_site.identity("d1")) as sock:
        del embedded_site.known["d1"]
        assert raw.is_closed(sock)
    with pytest.raises(LinkError, match="Not authorized"):
        embedded_site.connect("d1")


def test_a_registry_that_fails_admits_no_client(
    embedded_site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_name: str, _fingerprint: str) -> Grants | None:
        raise OSError("the database is gone")

    with EmbeddedBroker(HOST, 0, embedded_site.tls, LookupRegistry(broken)) as broker:
        embedded_site.port = broker.port
        with pytest.raises(LinkError, match="Server unavailable"):
            embedded_site.connect("d1")
    assert "the database is gone" in caplog.text


def test_one_name_has_a_limit_of_connections(embedded_site: Site) -> None:
    identity = embedded_site.identity("a1")
    with ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS_PER_NAME):
            sock = stack.enter_context(raw.tls_socket(identity))
            sock.sendall(raw.connect(""))
            assert raw.receive(sock, 4) == raw.ACCEPTED
        one_more = stack.enter_context(raw.tls_socket(identity))
        one_more.sendall(raw.connect(""))
        assert raw.receive(one_more, 4) == raw.REFUSED


def test_one_connection_has_a_limit_of_subscriptions(embedded_site: Site) -> None:
    with raw.connected(embedded_site.identity("d1")) as sock:
        codes = []
        for i in range(MAX_FILTERS + 1):
            sock.sendall(raw.subscribe(topics.to_device("d1", f"s{i}")))
            codes.append(raw.receive(sock, 5)[-1])
    assert codes == [0] * MAX_FILTERS + [0x80]


def test_overlapping_subscriptions_bring_a_message_once(embedded_site: Site) -> None:
    with embedded_site.connect("w1") as worker, raw.connected(embedded_site.identity("d1")) as sock:
        for topic_filter in (SESSION, "ce/v1/d/d1/s/+"):
            sock.sendall(raw.subscribe(topic_filter))
            raw.receive(sock, 5)
        worker.publish(SESSION, b"once")
        worker.publish(SESSION, b"next")
        wanted = raw.publish(SESSION, b"once") + raw.publish(SESSION, b"next")
        assert raw.receive(sock, len(wanted)) == wanted


@pytest.mark.parametrize("request_name", ["r1", "status", "config", "revoked"])
def test_only_status_and_config_are_kept_for_later(embedded_site: Site, request_name: str) -> None:
    inbox = Inbox()
    topic = topics.device_reply("d1", "a1", request_name)
    with embedded_site.connect("d1") as device, embedded_site.connect("a1") as app:
        device.publish(topic, b"kept for ever", qos=1, retain=True)
        app.subscribe("ce/v1/d/d1/status", inbox, qos=1)
        device.publish(STATUS, b"born", qos=1, retain=True)
        assert inbox.get()[1] == b"born"
        app.subscribe(topic, inbox, qos=1)
        device.publish(topic, b"marker", qos=1)
        assert inbox.until(b"marker") == []


def test_many_messages_from_many_devices_reach_the_worker_in_each_ones_order(
    embedded_site: Site,
) -> None:
    inbox = Inbox()
    with embedded_site.connect("w1") as worker, ExitStack() as stack:
        worker.subscribe("ce/v1/w/w1/+/+", inbox)
        devices = [stack.enter_context(embedded_site.connect(name)) for name in ("d1", "d2")]

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


def test_a_silent_connection_delays_no_other_client(embedded_site: Site) -> None:
    with (
        socket.create_connection((HOST, embedded_site.port)),
        raw.tls_socket(embedded_site.identity("d2")),
    ):
        embedded_site.connect("d1").close()
