"""The revocation list: content, signature, and replacement of its file."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fleet.errors import IdentityError
from provisioning.authority import CertificateAuthority
from provisioning.crl import CRL_DAYS, RENEW_S, CrlFile

REVOKED_AT = datetime(2025, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Entry:
    serial: str
    revoked_at: float | None = REVOKED_AT.timestamp()


def load(path: Path) -> x509.CertificateRevocationList:
    return x509.load_pem_x509_crl(path.read_bytes())


@pytest.fixture
def crl(tmp_path: Path, authority: CertificateAuthority) -> CrlFile:
    return CrlFile(tmp_path / "crl.pem", authority)


def now() -> float:
    return datetime.now(UTC).timestamp()


def test_it_lists_revoked_certificates_with_their_time_and_those_on_hold(
    authority: CertificateAuthority,
) -> None:
    crl = x509.load_pem_x509_crl(authority.crl([Entry("0a"), Entry("ff", None)]))
    revoked = crl.get_revoked_certificate_by_serial_number(10)
    on_hold = crl.get_revoked_certificate_by_serial_number(255)
    assert revoked is not None
    assert revoked.revocation_date_utc == REVOKED_AT
    assert on_hold is not None
    assert (
        on_hold.extensions.get_extension_for_class(x509.CRLReason).value.reason
        is x509.ReasonFlags.certificate_hold
    )
    assert len(crl) == 2


def test_the_authority_signs_it(authority: CertificateAuthority, tmp_path: Path) -> None:
    issuer = x509.load_pem_x509_certificate((tmp_path / "ca" / "ca.pem").read_bytes())
    crl = x509.load_pem_x509_crl(authority.crl([]))
    assert crl.issuer == issuer.subject
    key = issuer.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert crl.is_signature_valid(key)


def test_it_is_valid_for_seven_days_and_also_where_a_clock_is_behind(
    authority: CertificateAuthority,
) -> None:
    crl = x509.load_pem_x509_crl(authority.crl([]))
    assert crl.next_update_utc is not None
    assert crl.next_update_utc - datetime.now(UTC) == pytest.approx(
        timedelta(days=CRL_DAYS), abs=timedelta(minutes=1)
    )
    assert crl.last_update_utc < datetime.now(UTC) - timedelta(minutes=4)


def test_an_update_returns_the_serials_that_are_new(crl: CrlFile) -> None:
    assert crl.update([Entry("a")], now()) == frozenset("a")
    assert crl.update([Entry("a"), Entry("0B")], now()) == frozenset("b")
    assert [f"{entry.serial_number:x}" for entry in load(crl.path)] == ["a", "b"]


def test_an_unchanged_list_is_not_written(crl: CrlFile) -> None:
    crl.update([Entry("a")], now())
    before = crl.path.read_bytes()
    assert crl.update([Entry("a")], now()) is None
    assert crl.path.read_bytes() == before


def test_a_file_is_replaced_after_a_day_without_changes(crl: CrlFile) -> None:
    crl.update([Entry("a")], now())
    assert crl.update([Entry("a")], now() + RENEW_S - 600) is None
    assert crl.update([Entry("a")], now() + RENEW_S) == frozenset()


def test_a_certificate_that_is_resumed_leaves_the_file(crl: CrlFile) -> None:
    crl.update([Entry("a", None)], now())
    assert crl.update([], now()) == frozenset()
    assert len(load(crl.path)) == 0


def test_a_malformed_file_is_replaced(crl: CrlFile) -> None:
    crl.path.write_text("torn")
    assert crl.update([], now()) == frozenset()
    assert len(load(crl.path)) == 0


def test_a_file_that_cannot_be_written_is_named(
    tmp_path: Path, authority: CertificateAuthority
) -> None:
    with pytest.raises(IdentityError, match=r"crl\.pem"):
        CrlFile(tmp_path / "absent" / "crl.pem", authority).update([], now())
