"""Certificate signing requests (PKCS #10, RFC 2986) from untrusted senders, and their checks."""

from __future__ import annotations

from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from fleet.errors import CsrError
from provisioning.certificate import hash_key


@dataclass(frozen=True)
class SigningRequest:
    """A public P-256 key whose private key the sender holds, and the CN, None without one."""

    public_key: ec.EllipticCurvePublicKey
    key_hash: str
    name: str | None

    @classmethod
    def parse(cls, pem: str) -> SigningRequest:
        """Parse a request in PEM. Only its key and its CN are used.

        Role, name and validity of the certificate come from the registry and the authority.

        Raises:
            CsrError: `pem` is malformed, its key is no P-256 key, its signature is invalid, or it
                has several CNs.
        """
        request, key, names = _load(pem)
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
            raise CsrError(
                f"expected a signing request for a P-256 key, got {_kind(key)}; "
                "make a key of that kind"
            )
        if not _is_signed(request):
            raise CsrError(
                "the signing request was not signed with its own key, or was altered; make it again"
            )
        if len(names) > 1:
            raise CsrError(
                f"expected a signing request with one common name at most, got {len(names)}"
            )
        return cls(key, hash_key(key), names[0] if names else None)


def _load(pem: str) -> tuple[x509.CertificateSigningRequest, object, list[str]]:
    """Return a request with its key and its common names. Raises CsrError."""
    try:
        request = x509.load_pem_x509_csr(pem.encode())
        names = request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return request, request.public_key(), [str(name.value) for name in names]
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise CsrError(f"expected a certificate signing request in PEM: {error}") from None


def _is_signed(request: x509.CertificateSigningRequest) -> bool:
    try:
        return request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature):
        return False


def _kind(key: object) -> str:
    match key:
        case ec.EllipticCurvePublicKey():
            return f"one on the curve {key.curve.name}"
        case rsa.RSAPublicKey():
            return f"an RSA key of {key.key_size} bits"
    return f"an {type(key).__name__}"
