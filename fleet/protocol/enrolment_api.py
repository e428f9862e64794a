"""How a device joins over HTTPS: the enrolment token, and the bodies of requests and replies, all JSON.

The token carries the SHA-256 of the fleet's CA certificate, so that a device knows whom it talks to before it trusts
anybody, as kubeadm's does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Final, TypeVar

import msgspec
from msgspec import Meta, Struct

from fleet.errors import DecodeError, TokenError
from fleet.protocol.access import Role
from fleet.protocol.desired_config import DesiredConfig
from fleet.protocol.messages import Id

CA_PATH: Final = "/v1/ca"
CRL_PATH: Final = "/v1/crl"
JOIN_PATH: Final = "/v1/join"
RENEW_PATH: Final = "/v1/renew"
BUNDLES_PATH: Final = "/v1/bundles"  # /<bundle id>/<name of a file as in the manifest, or the manifest's or signature's>
MAX_BODY_BYTES: Final = 16 * 1024
TOKEN: Final = re.compile(r"([0-9a-f]{64})\.([0-9a-f]{16})\.([0-9a-f]{64})")

Pem = Annotated[str, Meta(max_length=8192)]
Hex = Annotated[str, Meta(max_length=64, pattern=r"\A[0-9a-f]+\Z")]
T = TypeVar("T")


@dataclass(frozen=True)
class EnrolmentToken:
    """`ca_sha256` is of the CA certificate's DER; the `secret` (256 bits) works once, for one key."""

    ca_sha256: str
    id: str
    secret: str = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> EnrolmentToken:
        """Raises TokenError when `text` is no token; the message does not repeat it."""
        match = TOKEN.fullmatch(text.strip())
        if not match:
            raise TokenError(
                "that is no enrolment token: expected <64 hex digits>.<16>.<64>, as 'fleet enroll NAME' prints it"
            )
        return cls(*match.groups())

    def __str__(self) -> str:
        return f"{self.ca_sha256}.{self.id}.{self.secret}"


class JoinRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """`csr` is a certificate signing request in PEM for a P-256 key; its CN, where it has one, is the token's name."""

    id: Hex
    secret: Hex
    csr: Pem


class JoinReply(Struct, frozen=True, kw_only=True):
    """All that an identity needs. The same key that asks again with the same token gets the same certificate.

    `host` and `port` are the broker's, `server` the base URL of this service.
    """

    name: Id
    role: Role
    certificate: Pem
    ca: Pem
    host: str
    port: int
    server: str
    topic_prefix: str
    config: DesiredConfig
    bundle_id: str | None = None
    shared_subscriptions: bool = False


class RenewRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """A signing request for a new key; who asks is who its TLS certificate says."""

    csr: Pem


class RenewReply(Struct, frozen=True):
    certificate: Pem


class ServiceProblem(Struct, frozen=True):
    """The body of every reply that is no success: `code` of an error in `fleet.errors`, and its message."""

    code: str
    message: str


def decode_body(data: bytes, kind: type[T]) -> T:
    """Raises DecodeError when `data` is no `kind` in JSON; the message does not repeat what came."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(f"expected a {kind.__name__} in JSON: {error}") from None
