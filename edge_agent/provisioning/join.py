"""Joining a fleet: from a token to an identity folder, with a key that never leaves the device."""

from __future__ import annotations

import ssl
import time
import warnings
from pathlib import Path
from typing import Final

import msgspec
from urllib3.exceptions import InsecureRequestWarning

from edge_agent.provisioning.credentials import (
    check_certificate,
    fingerprint,
    new_key,
    only_first,
    signing_request,
)
from edge_agent.service_client import ServiceClient, check_url, retry_while_away
from edge_agent.state.bundle_slots import Slots, SlotStore
from edge_agent.state.desired_state import save_desired
from fleet.errors import ConfigError, IdentityError, ServiceError
from fleet.identity.identity import (
    CA_FILE,
    CERT_FILE,
    IDENTITY_FILE,
    KEY_FILE,
    Identity,
    IdentityConfig,
)
from fleet.protocol.enrolment_api import EnrolmentToken, JoinReply, JoinRequest
from fleet.protocol.topics import PREFIX
from fleet.utils.atomic_files import create_file, write_file

JOIN_S: Final = 120.0


def join_fleet(
    token: EnrolmentToken, server: str, out: Path, *, timeout_s: float = JOIN_S
) -> Identity:
    """Join the fleet whose service is at `server`, and write the identity folder `out`.

    The key is on disk before the request is sent: a device that lost the reply repeats the request
    with the same key, and receives the same certificate for the same token. `identity.json` comes
    last. The id of the fleet's bundle is stored, but the bundle is not fetched.

    Raises:
        ConfigError: `server` is no ``https://HOST:PORT``, or speaks another protocol.
        IdentityError: `out` is an identity already or cannot be written, or the token or the
            certificate is not valid.
        ServiceError: the service cannot be reached, or does not belong to the token.
    """
    server = check_url(server)
    if (out / IDENTITY_FILE).exists():
        raise IdentityError(
            f"{out} is complete: it is the identity of {Identity.load(out).name}; "
            f"start it with 'edge-agent run {out}' or name another folder with --out"
        )
    deadline = time.monotonic() + timeout_s
    key = own_key(out)
    ca = pinned_ca(server, token.ca_sha256, timeout_s)
    request = JoinRequest(token.id, token.secret, signing_request(key))
    with ServiceClient(server, trusting_only(ca)) as service:
        reply = retry_while_away(
            lambda: service.join(request), timeout_s=deadline - time.monotonic()
        )
    return write_joined_identity(out, reply, key, ca)


def own_key(out: Path) -> bytes:
    """Return the private key in `out` (mode 0600, in a folder of 0700); make it if there is none.

    Raises:
        IdentityError: the key cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        out.chmod(0o700)
        return create_file(out / KEY_FILE, new_key())
    except OSError as error:
        raise _not_written(out, error) from None


def pinned_ca(server: str, ca_sha256: str, timeout_s: float) -> bytes:
    """Fetch the CA certificate in PEM whose SHA-256 is in the token, from an unverified server.

    Raises:
        ServiceError: the server's CA is another one.
    """
    ca = _fetch_unverified_ca(server, timeout_s)
    try:
        actual_sha256 = fingerprint(ca)
    except IdentityError as error:
        raise ServiceError(
            f"{server} is no service of a fleet: {error}; check the address and the port"
        ) from None
    if actual_sha256 != ca_sha256:
        raise ServiceError(
            f"{server} has another CA than the token's "
            f"(SHA-256 {actual_sha256[:16]}..., expected {ca_sha256[:16]}...): "
            "the connection may be intercepted, or the address may be another fleet's; "
            "nothing was sent, and the token is still valid"
        )
    return only_first(ca)


def _fetch_unverified_ca(server: str, timeout_s: float) -> bytes:
    unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE
    with ServiceClient(server, unverified) as service, warnings.catch_warnings():
        warnings.simplefilter("ignore", InsecureRequestWarning)  # the caller verifies the hash
        return retry_while_away(service.ca, timeout_s=timeout_s)


def trusting_only(ca: bytes) -> ssl.SSLContext:
    """Return a context for TLS 1.2 or later that trusts only the CA in PEM."""
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cadata=ca.decode())
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def write_joined_identity(out: Path, reply: JoinReply, key: bytes, ca: bytes) -> Identity:
    """Write the reply into `out`, which contains the key already.

    Raises:
        ConfigError: the fleet speaks another protocol.
        IdentityError: the certificate is not ours, or the folder cannot be written.
    """
    if reply.topic_prefix != PREFIX:
        raise ConfigError(
            f"this fleet speaks {reply.topic_prefix[:80]!r}, this device {PREFIX!r}; "
            "install the fleet's version here"
        )
    certificate = reply.certificate.encode()
    check_certificate(certificate, key, ca, reply.name, time.time())
    config = IdentityConfig(
        name=reply.name,
        role=reply.role,
        host=reply.host,
        port=reply.port,
        shared_subscriptions=reply.shared_subscriptions,
        server=check_url(reply.server),
    )
    try:
        write_file(out / CERT_FILE, certificate, mode=0o644)
        write_file(out / CA_FILE, ca, mode=0o644)
        save_desired(out, reply.config)
        SlotStore(out).save(Slots(current=reply.bundle_id))
        content = msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n"
        write_file(out / IDENTITY_FILE, content, mode=0o644)
    except OSError as error:
        raise _not_written(out, error) from None
    return Identity(out, config)


def _not_written(out: Path, error: OSError) -> IdentityError:
    return IdentityError(
        f"cannot write an identity into {out}: {error.strerror}; name another folder with --out"
    )
