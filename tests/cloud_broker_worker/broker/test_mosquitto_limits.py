"""The limits in mosquitto's configuration: readers that do not read, retained messages."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cloud_broker_worker.broker.mosquitto import (
    MAX_CONNECTIONS,
    MAX_MEMORY_BYTES,
    MAX_QUEUED_BYTES,
    write_config,
)
from fleet.protocol import topics
from fleet.transport.base import MAX_PACKET_BYTES
from tests.brokers import (
    Inbox,
    Mosquitto,
    Site,
    find_mosquitto,
    free_port,
    running_site,
    wait_until,
)
from tests.cloud_broker_worker.broker import raw

pytestmark = pytest.mark.mosquitto

MAX_MB = 300
PAYLOAD = bytes(900_000)
NUM_MESSAGES = 500


@pytest.fixture
def mosquitto_site(tmp_path: Path) -> Iterator[Site]:
    with running_site("mosquitto", tmp_path) as running:
        yield running


def peak_mb(site: Site) -> float:
    """The most memory that the broker has had."""
    assert isinstance(site.broker, Mosquitto)
    status = Path(f"/proc/{site.broker._process.pid}/status").read_text("utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def publish_many(site: Site, name: str, messages: Iterator[bytes]) -> None:
    """Publish all messages, the rest under a new connection after a disconnection."""
    for first in messages:
        with suppress(OSError, AssertionError), raw.connected(site.identity(name)) as sock:
            sock.sendall(first)
            for message in messages:
                sock.sendall(message)
            sock.sendall(raw.PINGREQ)
            while (received := sock.recv(65_536)) and received[-2:] != raw.PINGRESP:
                pass


def assert_serves(site: Site) -> None:
    """Fail unless other clients reach each other."""
    inbox = Inbox()
    with site.connect("d2") as device, site.connect("a2") as app:
        device.subscribe(topics.prompts_to("d2"), inbox, qos=1)
        app.publish(topics.device_prompt("d2", "a2", "r1"), b"prompt", qos=1)
        assert inbox.get()[1] == b"prompt"


def test_mosquitto_accepts_the_limits(mosquitto_site: Site) -> None:
    text = (mosquitto_site.folder / "mosquitto" / "mosquitto.conf").read_text()
    for line in (
        f"max_packet_size {MAX_PACKET_BYTES}",
        f"max_queued_bytes {MAX_QUEUED_BYTES}",
        f"memory_limit {MAX_MEMORY_BYTES}",
        f"max_connections {MAX_CONNECTIONS}",
    ):
        assert line in text.splitlines()
    assert_serves(mosquitto_site)


@pytest.mark.parametrize("qos", [0, 1])
def test_a_reader_that_does_not_read_costs_a_bounded_amount_of_memory(
    mosquitto_site: Site, qos: int
) -> None:
    site = mosquitto_site
    with raw.connected(site.identity("a1")) as stuck:
        stuck.sendall(raw.subscribe(topics.replies_to("a1"), qos=qos))
        raw.receive(stuck, 5)
        topic = topics.device_reply("d1", "a1", "r1")
        replies = (raw.publish(topic, PAYLOAD, qos, i + 1) for i in range(NUM_MESSAGES))
        publish_many(site, "d1", replies)
        assert_serves(site)
    assert peak_mb(site) < MAX_MB


def test_retained_messages_on_many_topics_cost_a_bounded_amount_of_memory(
    mosquitto_site: Site,
) -> None:
    topic_names = (topics.device_prompt("d1", "a1", f"r{i}") for i in range(NUM_MESSAGES))
    packets = (raw.publish(each, PAYLOAD) for each in topic_names)
    publish_many(mosquitto_site, "a1", (b"\x31" + each[1:] for each in packets))
    assert peak_mb(mosquitto_site) < MAX_MB


def test_mosquitto_listens_on_ipv6(mosquitto_site: Site) -> None:
    site = mosquitto_site
    port = free_port()
    config = write_config(site.folder / "six", port, site.tls, site.known.values(), "::1")
    process = subprocess.Popen([find_mosquitto("mosquitto"), "-c", str(config)])
    try:
        wait_until(lambda: _listens_on_ipv6(port), "mosquitto listens")
    finally:
        process.terminate()
        process.wait()


def _listens_on_ipv6(port: int) -> bool:
    with socket.socket(socket.AF_INET6) as probe:
        return probe.connect_ex(("::1", port)) == 0
