"""Renewal in time, and a matching pair of certificate and key at every moment."""

from __future__ import annotations

import stat
import threading
import time
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest

from fleet.errors import IdentityError, ServiceError
from fleet.identity.certificate_renewer import (
    CertificateRenewer,
    renew_certificate,
    renew_if_due,
    retry_in_s,
)
from fleet.identity.certificate_rotation import finish_renewal, renewal_in_s
from fleet.identity.credentials import lifetime, new_key, signing_request
from fleet.identity.identity import CA_FILE, CERT_FILE, KEY_FILE, RENEWED_FILE, Identity
from fleet.identity.service_client import ServiceClient
from fleet.protocol.enrolment_api import RenewRequest
from provisioning.authority import CertificateAuthority
from tests.brokers import wait_until
from tests.edge_agent.fleet_service import FleetService

DAY = 86400.0
WAIT_S = 60.0


@pytest.fixture
def identity(service: FleetService, tmp_path: Path) -> Identity:
    return service.identity(tmp_path / "kitchen")


@pytest.mark.parametrize(
    ("now", "draw", "wait_s"),
    [
        (0.0, 0.0, 60 * DAY),
        (0.0, 1.0, 63 * DAY),
        (59 * DAY, 0.0, DAY),
        (60 * DAY, 0.0, 0.0),
        (61 * DAY, 1.0, 2 * DAY),
        (100 * DAY, 0.5, 0.0),
    ],
)
def test_a_certificate_of_ninety_days_is_due_after_sixty(
    now: float, draw: float, wait_s: float
) -> None:
    assert renewal_in_s(0.0, 90 * DAY, now, draw) == pytest.approx(wait_s)


@pytest.mark.parametrize(
    ("remaining_s", "draw", "wait_s"),
    [(30 * DAY, 0.5, 600.0), (1000.0, 0.5, 50.0), (1000.0, 0.0, 25.0), (-5.0, 0.5, 1.0)],
)
def test_a_shorter_remaining_life_makes_retries_sooner(
    remaining_s: float, draw: float, wait_s: float
) -> None:
    assert retry_in_s(remaining_s, 0.0, draw) == pytest.approx(wait_s)


def test_a_renewal_replaces_key_and_certificate(service: FleetService, identity: Identity) -> None:
    before = (identity.folder / CERT_FILE).read_bytes()
    key = new_key()
    renew_certificate(identity, key)
    assert (identity.folder / KEY_FILE).read_bytes() == key
    assert (identity.folder / CERT_FILE).read_bytes() != before
    assert stat.S_IMODE((identity.folder / KEY_FILE).stat().st_mode) == 0o600
    assert not (identity.folder / RENEWED_FILE).exists()
    identity.ssl_context()


@pytest.mark.parametrize("num_moved", [0, 1])
def test_a_process_that_dies_in_a_renewal_leaves_a_pair_that_fits(
    service: FleetService, identity: Identity, num_moved: int
) -> None:
    key = new_key()
    certificate, _ = service._certify(signing_request(key, "kitchen"))
    (identity.folder / RENEWED_FILE).write_bytes(certificate.encode() + key)
    if num_moved:
        (identity.folder / KEY_FILE).write_bytes(key)
    identity.ssl_context()
    finish_renewal(identity.folder)
    assert (identity.folder / CERT_FILE).read_bytes() == certificate.encode()
    assert (identity.folder / KEY_FILE).read_bytes() == key
    assert not (identity.folder / RENEWED_FILE).exists()
    identity.ssl_context()


def test_a_refusal_leaves_the_old_pair(service: FleetService, identity: Identity) -> None:
    before = [(identity.folder / name).read_bytes() for name in (CERT_FILE, KEY_FILE)]
    service.refuse(403, "bad_state", "kitchen is suspended")
    with pytest.raises(IdentityError, match="suspended"):
        renew_certificate(identity, new_key())
    assert [(identity.folder / name).read_bytes() for name in (CERT_FILE, KEY_FILE)] == before


def test_a_certificate_for_another_key_leaves_the_old_pair(
    service: FleetService, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (identity.folder / CERT_FILE).read_bytes()
    monkeypatch.setattr(service, "_certify", lambda csr: (before.decode(), b""))
    with pytest.raises(IdentityError, match="for another key than ours"):
        renew_certificate(identity, new_key())
    assert (identity.folder / CERT_FILE).read_bytes() == before
    assert not (identity.folder / RENEWED_FILE).exists()


def test_a_request_with_a_lost_reply_is_repeated_with_the_same_key(
    service: FleetService, identity: Identity
) -> None:
    service.trouble.num_lost_replies = 1
    renew_certificate(identity, new_key())
    assert len(service.keys) == 2
    assert len(set(service.keys)) == 1


def test_a_service_of_another_fleet_gets_no_request(service: FleetService, tmp_path: Path) -> None:
    with FleetService(tmp_path / "foreign").running() as foreign:
        identity = service.identity(tmp_path / "kitchen")
        config = msgspec.structs.replace(identity.config, server=foreign.url)
        with pytest.raises(ServiceError, match="is not trusted"):
            renew_certificate(Identity(identity.folder, config), new_key())
        assert foreign.requests == []


def shorten(service: FleetService, identity: Identity, life_s: float) -> None:
    """Replace the certificate by one that is due and expires in `life_s` seconds."""
    key = (identity.folder / KEY_FILE).read_bytes()
    service.life = timedelta(seconds=life_s)
    certificate, _ = service._certify(signing_request(key, "kitchen"))
    (identity.folder / CERT_FILE).write_bytes(certificate.encode())
    service.life = timedelta(days=90)


def test_a_certificate_that_is_due_is_renewed_while_in_use(
    service: FleetService, identity: Identity
) -> None:
    shorten(service, identity, 60)
    renewed = threading.Event()
    with CertificateRenewer(identity, renewed.set):
        assert renewed.wait(WAIT_S)
        time.sleep(0.2)
    assert len(service.keys) == 1
    assert lifetime((identity.folder / CERT_FILE).read_bytes())[1] > time.time() + 80 * DAY


def test_a_certificate_that_is_not_due_is_kept(service: FleetService, identity: Identity) -> None:
    with CertificateRenewer(identity, lambda: None):
        time.sleep(0.3)
    assert service.requests == []


def test_a_failed_renewal_is_repeated_with_the_same_key(
    service: FleetService, identity: Identity
) -> None:
    shorten(service, identity, 20)
    service.refuse(500, "internal", "it failed", times=1)
    service.trouble.num_lost_replies = 0
    renewed = threading.Event()
    with CertificateRenewer(identity, renewed.set):
        assert renewed.wait(WAIT_S)
    assert service.paths("/renew") == ["", ""]
    assert len(service.keys) == 1


def test_an_interrupted_renewal_is_completed_at_the_next_start(
    service: FleetService, identity: Identity
) -> None:
    key = new_key()
    certificate, _ = service._certify(signing_request(key, "kitchen"))
    (identity.folder / RENEWED_FILE).write_bytes(certificate.encode() + key)
    with CertificateRenewer(identity, lambda: None):
        wait_until(lambda: not (identity.folder / RENEWED_FILE).exists(), "the renewal is complete")
    assert (identity.folder / KEY_FILE).read_bytes() == key


def test_an_identity_without_a_service_is_renewed_by_hand(
    service: FleetService, identity: Identity
) -> None:
    shorten(service, identity, 60)
    config = msgspec.structs.replace(identity.config, server=None)
    with CertificateRenewer(Identity(identity.folder, config), lambda: None) as renewer:
        assert not renewer._thread.is_alive()


def test_an_expired_certificate_is_named(service: FleetService, identity: Identity) -> None:
    shorten(service, identity, -1)
    request = RenewRequest(signing_request(new_key(), "kitchen"))
    with ServiceClient.of(identity) as client, pytest.raises(ServiceError, match="our certificate"):
        client.renew(request)


@pytest.mark.parametrize("content", [b"", b"-----BEGIN CERTIFICATE-----\n", b"\0" * 4096])
def test_a_damaged_renewal_leaves_the_pair_and_is_removed(
    identity: Identity, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    pair = [(identity.folder / name).read_bytes() for name in (CERT_FILE, KEY_FILE)]
    (identity.folder / RENEWED_FILE).write_bytes(content)
    identity.ssl_context()
    finish_renewal(identity.folder)
    assert [(identity.folder / name).read_bytes() for name in (CERT_FILE, KEY_FILE)] == pair
    assert not (identity.folder / RENEWED_FILE).exists()
    assert "holds no certificate with its key" in caplog.text


def test_a_renewal_with_a_key_of_another_certificate_is_removed(
    service: FleetService, identity: Identity
) -> None:
    certificate, _ = service._certify(signing_request(new_key(), "kitchen"))
    (identity.folder / RENEWED_FILE).write_bytes(certificate.encode() + new_key())
    finish_renewal(identity.folder)
    assert not (identity.folder / RENEWED_FILE).exists()
    identity.ssl_context()


def test_a_renewal_brings_the_certificates_of_a_rotated_authority(
    service: FleetService, identity: Identity, tmp_path: Path
) -> None:
    successor = CertificateAuthority.create(tmp_path / "ca-next", name="the successor")
    service.new_ca = service.authority.pem + successor.pem
    service.authority.successor = successor
    renew_certificate(identity, new_key())
    assert (identity.folder / CA_FILE).read_text() == service.new_ca
    identity.ssl_context()


def test_a_certificate_of_an_authority_that_the_reply_does_not_name_is_refused(
    service: FleetService, identity: Identity, tmp_path: Path
) -> None:
    before = (identity.folder / CA_FILE).read_text()
    service.new_ca = CertificateAuthority.create(tmp_path / "other").pem
    with pytest.raises(IdentityError, match="not by the fleet's CA"):
        renew_certificate(identity, new_key())
    assert (identity.folder / CA_FILE).read_text() == before


def test_an_app_renews_when_it_is_due_or_at_once(service: FleetService, identity: Identity) -> None:
    assert not renew_if_due(identity)
    assert renew_if_due(identity, at_once=True)
    shorten(service, identity, 60)
    assert renew_if_due(identity)
    assert lifetime((identity.folder / CERT_FILE).read_bytes())[1] > time.time() + 80 * DAY
