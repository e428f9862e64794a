"""Signing requests of untrusted senders: acceptance, and refusals with their reasons."""

from __future__ import annotations

import base64

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.x509.oid import NameOID

from fleet.errors import CsrError
from fleet.protocol.access import Role
from provisioning.authority import CertificateAuthority
from provisioning.certificate import hash_key
from provisioning.csr import SigningRequest
from tests.provisioning.conftest import make_csr


def request(key: CertificateIssuerPrivateKeyTypes, *names: str) -> str:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, algorithm)
    return csr.public_bytes(serialization.Encoding.PEM).decode()


def test_a_request_for_a_p256_key_is_accepted_with_or_without_a_name() -> None:
    pem, key = make_csr("edge-1")
    parsed = SigningRequest.parse(pem)
    assert (parsed.name, parsed.public_key) == ("edge-1", key.public_key())
    assert parsed.key_hash == hash_key(key.public_key())
    assert SigningRequest.parse(make_csr()[0]).name is None


def test_requested_subject_and_extensions_are_ignored(
    authority: CertificateAuthority,
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "server")])
    wish = x509.BasicConstraints(ca=True, path_length=None)
    builder = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .add_extension(wish, critical=True)
    )
    parsed = SigningRequest.parse(
        builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()
    )
    issued = authority.sign(parsed.public_key, "edge-1", Role.DEVICE)
    certificate = x509.load_pem_x509_certificate(issued.pem.encode())
    assert certificate.subject.rfc4514_string() == "CN=edge-1,OU=device"
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert issued.key_hash == parsed.key_hash
    assert int(issued.serial, 16) == certificate.serial_number


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (rsa.generate_private_key(65537, 1024), "an RSA key of 1024 bits"),
        (rsa.generate_private_key(65537, 2048), "an RSA key of 2048 bits"),
        (ec.generate_private_key(ec.SECP224R1()), "one on the curve secp224r1"),
        (ec.generate_private_key(ec.SECP384R1()), "one on the curve secp384r1"),
        (ed25519.Ed25519PrivateKey.generate(), "an Ed25519PublicKey"),
    ],
    ids=["rsa-1024", "rsa-2048", "p-224", "p-384", "ed25519"],
)
def test_another_kind_of_key_is_refused_by_its_name(
    key: CertificateIssuerPrivateKeyTypes, kind: str
) -> None:
    with pytest.raises(CsrError, match=f"expected a signing request for a P-256 key, got {kind}"):
        SigningRequest.parse(request(key, "edge-1"))


def test_a_request_that_was_altered_is_refused() -> None:
    pem, _ = make_csr("edge-1")
    der = bytearray(base64.b64decode("".join(pem.splitlines()[1:-1])))
    der[der.index(b"edge-1") + 5] = ord("2")
    altered = base64.encodebytes(bytes(der)).decode()
    with pytest.raises(CsrError, match="not signed with its own key, or was altered"):
        SigningRequest.parse(
            f"-----BEGIN CERTIFICATE REQUEST-----\n{altered}-----END CERTIFICATE REQUEST-----\n"
        )


def test_a_request_with_two_names_is_refused() -> None:
    with pytest.raises(CsrError, match="one common name at most, got 2"):
        SigningRequest.parse(request(ec.generate_private_key(ec.SECP256R1()), "edge-1", "edge-2"))


@pytest.mark.parametrize(
    "pem", ["", "nonsense", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n", "\ud7ff" * 10, "\x00"]
)
def test_a_malformed_request_is_refused(pem: str) -> None:
    with pytest.raises(CsrError, match="expected a certificate signing request in PEM"):
        SigningRequest.parse(pem)


def test_a_certificate_is_no_request(authority: CertificateAuthority) -> None:
    with pytest.raises(CsrError, match="expected a certificate signing request in PEM"):
        SigningRequest.parse(authority.pem)
