"""The enrolment API over HTTPS: the enrolment token, and the JSON bodies of requests and replies.

The token carries the SHA-256 of the fleet's CA certificate, so that a device can verify the service
before it trusts any CA, as with kubeadm.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Final, TypeVar

from msgspec import Meta, Struct

from fleet.errors import DecodeError, TokenError
from fleet.protocol.access import Role
from fleet.protocol.desired_config import DesiredConfig
from fleet.protocol.types import Id
from fleet.utils.json_text import parse_json
from fleet.utils.validation import JSON_ERRORS

CA_PATH: Final = "/v1/ca"
CRL_PATH: Final = "/v1/crl"
JOIN_PATH: Final = "/v1/join"
RENEW_PATH: Final = "/v1/renew"
# /<bundle id>/<name of a file as in the manifest, or of the manifest or the signature itself>
BUNDLES_PATH: Final = "/v1/bundles"
# /<version>/<name of the manifest, of its signature or of the wheel>
SOFTWARE_PATH: Final = "/v1/software"
MAX_BODY_BYTES: Final = 16 * 1024
TOKEN: Final = re.compile(r"([0-9a-f]{64})\.([0-9a-f]{16})\.([0-9a-f]{64})")

Pem = Annotated[str, Meta(max_length=8192)]
Hex = Annotated[str, Meta(max_length=64, pattern=r"\A[0-9a-f]+\Z")]
T = TypeVar("T")


@dataclass(frozen=True)
class EnrolmentToken:
    """A one-time token. `ca_sha256` is the hash of the CA certificate's DER.

    The `secret` (256 bits) works once, for one key.
    """

    ca_sha256: str
    id: str
    secret: str = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> EnrolmentToken:
        """Parse a token. Raises TokenError; its message does not repeat `text`."""
        match = TOKEN.fullmatch(text.strip())
        if not match:
            raise TokenError(
                "that is no enrolment token: expected <64 hex digits>.<16>.<64>, "
                "as 'fleet enroll NAME' prints it"
            )
        return cls(*match.groups())

    def __str__(self) -> str:
        return f"{self.ca_sha256}.{self.id}.{self.secret}"


class JoinRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """A request to join with a token.

    `csr` is a certificate signing request in PEM for a P-256 key; its CN, if it has one, is the
    token's name.
    """

    id: Hex
    secret: Hex
    csr: Pem


class JoinReply(Struct, frozen=True, kw_only=True):
    """Everything that an identity needs.

    A request with the same token and the same key again returns the same certificate. `ca` holds
    the CA certificates to trust: that of the token, and a second one while the fleet's authority is
    rotated.
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
    """A signing request for a new key. The TLS certificate of the client identifies it."""

    csr: Pem


class RenewReply(Struct, frozen=True, omit_defaults=True):
    """The certificate of the new key in PEM.

    `ca` holds the CA certificates that the client must trust from now on: two while the fleet's
    authority is rotated. An older service does not send them.
    """

    certificate: Pem
    ca: Pem | None = None


class ServiceProblem(Struct, frozen=True):
    """The body of every error reply: `code` of an error in `fleet.errors`, and its message."""

    code: str
    message: str


def decode_body(data: bytes, kind: type[T]) -> T:
    """Decode a `kind` in JSON. Raises DecodeError; its message does not repeat `data`."""
    try:
        return parse_json(data, kind)
    except JSON_ERRORS as error:
        raise DecodeError(f"expected a {kind.__name__} in JSON: {error}") from None
