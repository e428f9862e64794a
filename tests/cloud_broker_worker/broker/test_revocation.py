"""Revoked, suspended and re-enrolled devices lose their sessions within seconds on both brokers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from cloud_broker_worker.broker import mosquitto_sync
from fleet.errors import LinkError
from fleet.identity.identity import Identity
from fleet.protocol import topics
from fleet.protocol.access import Role
from fleet.transport.base import Will
from fleet.transport.mqtt import MqttTransport
from provisioning.certificate import write_identity
from provisioning.fleet_address import FleetAddress
from tests.brokers import BROKERS, HOST, Inbox, can_connect, wait_until
from tests.cloud_broker_worker.broker import raw
from tests.registered import RegisteredSite, registered_site

OUT_S = 5.0
MARKER = b"marker"


@pytest.fixture(params=BROKERS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RegisteredSite]:
    with registered_site(request.param, tmp_path) as running:
        yield running


@pytest.fixture
def mosquitto_site(tmp_path: Path) -> Iterator[RegisteredSite]:
    with registered_site("mosquitto", tmp_path) as running:
        yield running


def wait_until_out(identity: Identity) -> None:
    wait_until(lambda: not can_connect(identity), f"{identity.name} is refused")


def test_a_revoked_devices_connection_ends_within_five_seconds(site: RegisteredSite) -> None:
    with (
        raw.connected(site.identities["d1"]) as sock,
        raw.connected(site.identities["d2"]) as other,
    ):
        site.registry.identities.revoke("d1")
        wait_until(partial(raw.has_ended, sock), "its connection ends", OUT_S)
        other.sendall(raw.PINGREQ)
        assert raw.receive(other, 2) == raw.PINGRESP
        assert not can_connect(site.identities["d1"])


def test_a_client_that_reconnects_while_it_is_revoked_stays_out(site: RegisteredSite) -> None:
    inbox = Inbox()
    with site.connect("s1") as watcher, site.connect("d2") as honest:
        watcher.subscribe(topics.DEVICE_STATUS_FILTER, inbox, qos=1)
        site.registry.identities.revoke("d1")
        wait_until_out(site.identities["d1"])
        for _ in range(5):
            with (
                suppress(LinkError),
                site.connect("d1", Will(topics.device_status("d1"), b"will")) as revoked,
            ):
                revoked.publish(topics.device_status("d1"), b"revoked", qos=1)
        honest.publish(topics.device_status("d2"), MARKER, qos=1)
        assert inbox.until(MARKER) == []


def test_the_old_certificate_of_a_name_that_was_enrolled_again_is_refused(
    site: RegisteredSite,
) -> None:
    old = site.identities["d1"]
    site.registry.identities.revoke("d1")
    wait_until_out(old)
    new = site.enroll("d1")
    wait_until(lambda: can_connect(new), "the new certificate is taken")
    assert not can_connect(old)


def test_a_thief_with_the_old_certificate_reaches_nothing_of_the_name_that_was_enrolled_again(
    site: RegisteredSite,
) -> None:
    old = site.identities["d1"]
    inbox = Inbox()
    site.registry.identities.revoke("d1")
    wait_until_out(old)
    site.enroll("d1")
    with site.connect("a1") as app, site.connect("d1") as device:
        app.subscribe(topics.device_reply("d1", "a1", "+"), inbox, qos=1)
        for _ in range(3):
            with suppress(LinkError), MqttTransport.connect(old) as thief:
                thief.publish(topics.device_reply("d1", "a1", "r1"), b"forged", qos=1)
        device.publish(topics.device_reply("d1", "a1", "r1"), MARKER, qos=1)
        assert inbox.until(MARKER) == []
        assert device.is_up


def test_a_suspended_device_is_out_and_comes_back_with_the_same_certificate(
    site: RegisteredSite,
) -> None:
    with raw.connected(site.identities["d1"]) as sock:
        site.registry.identities.suspend("d1")
        assert raw.is_closed(sock)
        with pytest.raises(LinkError, match="'fleet resume d1'"):
            MqttTransport.connect(site.identities["d1"])
    site.registry.identities.resume("d1")
    wait_until(lambda: can_connect(site.identities["d1"]), "it is let in again")


def test_an_expired_certificate_is_refused(site: RegisteredSite, tmp_path: Path) -> None:
    made = site.authority.certify("d1", Role.DEVICE, timedelta(seconds=-1))
    config = FleetAddress(host=HOST, port=site.port).identity_config("d1", Role.DEVICE)
    assert not can_connect(write_identity(made, tmp_path / "late", config))


def test_a_device_that_is_enrolled_later_is_admitted_with_its_rights(site: RegisteredSite) -> None:
    inbox = Inbox()
    site.enroll("d3")
    with site.connect("s1") as watcher:
        watcher.subscribe(topics.DEVICE_STATUS_FILTER, inbox, qos=1)

        def is_heard() -> bool:
            with site.connect("d3") as device:
                device.publish(topics.device_status("d3"), b"born", qos=1)
            return not inbox.is_empty

        wait_until(is_heard, "its status arrives")


@pytest.mark.mosquitto
def test_a_client_that_connects_after_the_revocation_of_its_certificate_has_no_rights(
    mosquitto_site: RegisteredSite,
) -> None:
    site = mosquitto_site
    inbox = Inbox()
    with (
        site.connect("s1") as watcher,
        site.connect("d2") as honest,
        raw.connected(site.identities["d1"]) as open_one,
        raw.tls_socket(site.identities["d1"]) as silent,
    ):
        watcher.subscribe(topics.DEVICE_STATUS_FILTER, inbox, qos=1)
        site.registry.identities.revoke("d1")
        assert raw.is_closed(open_one)
        silent.sendall(
            raw.connect("d1") + raw.publish(topics.device_status("d1"), b"revoked", qos=1)
        )
        raw.receive(silent, 8)
        honest.publish(topics.device_status("d2"), MARKER, qos=1)
        assert inbox.until(MARKER) == []


@pytest.mark.mosquitto
def test_a_client_admitted_late_is_evicted_when_its_name_belongs_to_another_device_already(
    mosquitto_site: RegisteredSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if mosquitto ended silent connections at once.
    monkeypatch.setattr(mosquitto_sync, "SECOND_EVICTION_S", 6.0)
    site = mosquitto_site
    old = mosquitto_site.identities["d1"]
    with raw.tls_socket(old) as silent:
        site.registry.identities.revoke("d1")
        wait_until_out(old)
        new = site.enroll("d1")
        silent.sendall(raw.connect("d1"))
        assert raw.receive(silent, 4) == raw.ACCEPTED
        assert raw.is_closed(silent)
    wait_until(lambda: can_connect(new), "the device itself is let in")
