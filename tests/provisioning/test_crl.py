"""The revocation list: what stands in it, whose signature it has, and when its file is made anew."""

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


def test_it_lists_what_was_revoked_since_when_and_what_is_on_hold(
    authority: CertificateAuthority,
) -> None:
    made = x509.load_pem_x509_crl(authority.crl([Entry("0a"), Entry("ff", None)]))
    revoked = made.get_revoked_certificate_by_serial_number(10)
    held = made.get_revoked_certificate_by_serial_number(255)
    assert revoked is not None
    assert revoked.revocation_date_utc == REVOKED_AT
    assert held is not None
    assert (
        held.extensions.get_extension_for_class(x509.CRLReason).value.reason
        is x509.ReasonFlags.certificate_hold
    )
    assert len(made) == 2


def test_the_authority_signs_it(authority: CertificateAuthority, tmp_path: Path) -> None:
    issuer = x509.load_pem_x509_certificate((tmp_path / "ca" / "ca.pem").read_bytes())
    made = x509.load_pem_x509_crl(authority.crl([]))
    assert made.issuer == issuer.subject
    key = issuer.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert made.is_signature_valid(key)


def test_it_lives_seven_days_and_counts_already_where_a_clock_is_behind(
    authority: CertificateAuthority,
) -> None:
    made = x509.load_pem_x509_crl(authority.crl([]))
    assert made.next_update_utc is not None
    assert made.next_update_utc - datetime.now(UTC) == pytest.approx(
        timedelta(days=CRL_DAYS), abs=timedelta(minutes=1)
    )
    assert made.last_update_utc < datetime.now(UTC) - timedelta(minutes=4)


def test_the_file_says_which_serials_are_new_in_it(crl: CrlFile) -> None:
    assert crl.update([Entry("a")], now()) == frozenset("a")
    assert crl.update([Entry("a"), Entry("0B")], now()) == frozenset("b")
    assert [f"{entry.serial_number:x}" for entry in load(crl.path)] == ["a", "b"]


def test_a_file_that_says_so_already_is_left_alone(crl: CrlFile) -> None:
    crl.update([Entry("a")], now())
    before = crl.path.read_bytes()
    assert crl.update([Entry("a")], now()) is None
    assert crl.path.read_bytes() == before


def test_a_file_is_made_anew_after_a_day_though_nothing_was_revoked(crl: CrlFile) -> None:
    crl.update([Entry("a")], now())
    assert crl.update([Entry("a")], now() + RENEW_S - 600) is None
    assert crl.update([Entry("a")], now() + RENEW_S) == frozenset()


def test_what_is_on_hold_no_more_leaves_the_file(crl: CrlFile) -> None:
    crl.update([Entry("a", None)], now())
    assert crl.update([], now()) == frozenset()
    assert len(load(crl.path)) == 0


def test_a_file_that_is_none_is_replaced(crl: CrlFile) -> None:
    crl.path.write_text("torn")
    assert crl.update([], now()) == frozenset()
    assert len(load(crl.path)) == 0


def test_a_file_that_cannot_be_written_is_named(
    tmp_path: Path, authority: CertificateAuthority
) -> None:
    with pytest.raises(IdentityError, match=r"crl\.pem"):
        CrlFile(tmp_path / "absent" / "crl.pem", authority).update([], now())
