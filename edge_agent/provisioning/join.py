"""Joining a fleet: from a token to an identity folder, with a key that never leaves the device."""

from __future__ import annotations

import logging
import socket
import ssl
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from urllib3.exceptions import InsecureRequestWarning
from urllib3.util import parse_url

from edge_agent.state.bundle_slots import Slots, SlotStore
from edge_agent.state.desired_state import save_desired
from fleet.errors import ConfigError, IdentityError, ServiceError, TokenNameError, UsedTokenError
from fleet.identity.certificate_rotation import replace_pair
from fleet.identity.credentials import (
    check_certificate,
    contains_authority,
    fingerprint,
    is_key,
    new_key,
    only_first,
    signing_request,
)
from fleet.identity.identity import (
    CA_FILE,
    IDENTITY_FILE,
    KEY_FILE,
    Identity,
    IdentityConfig,
    check_identity_folder,
)
from fleet.identity.service_client import ServiceClient, check_url, log_wait, retry_while_away
from fleet.protocol.enrolment_api import EnrolmentToken, JoinReply, JoinRequest
from fleet.protocol.topics import PREFIX
from fleet.utils.atomic_files import create_file, move_aside, write_file
from fleet.utils.printable import command_line

JOIN_S: Final = 120.0
PROBE_S: Final = 2.0
JOINING_KEY_FILE: Final = "joining-key.pem"
"""The key of a pending request to repair a folder. The folder keeps its old key until the reply."""

log = logging.getLogger(__name__)


def join_fleet(
    token: EnrolmentToken, server: str, out: Path, *, timeout_s: float = JOIN_S
) -> Identity:
    """Join the fleet whose service is at `server`, and write the identity folder `out`.

    The key is on disk before the request is sent: a device that lost the reply repeats the request
    with the same key, and receives the same certificate for the same token. `identity.json` comes
    last. The id of the fleet's bundle is stored, but the bundle is not fetched.

    A folder that is an identity already is mended with a new token for the same name, for instance
    when its certificate has expired. Its settings, reports and bundles stay.

    Raises:
        ConfigError: `server` is no ``https://HOST:PORT``, or speaks another protocol.
        IdentityError: `out` is the identity of another name or cannot be written, or the token or
            the certificate is not valid.
        ServiceError: the service cannot be reached, or does not belong to the token.
    """
    server = check_url(server)
    check_identity_folder(out)
    present = _present_identity(out)
    deadline = time.monotonic() + timeout_s
    ca = pinned_ca(server, token.ca_sha256, timeout_s)
    name = present.name if present else None
    try:
        with _request_key(out, JOINING_KEY_FILE if present else KEY_FILE) as key:
            request = JoinRequest(token.id, token.secret, signing_request(key, name))
            with ServiceClient(server, trusting_only(ca)) as service:
                reply = retry_while_away(
                    lambda: service.join(request),
                    timeout_s=deadline - time.monotonic(),
                    on_wait=log_wait,
                )
    except (TokenNameError, UsedTokenError) as error:
        if present is None:
            raise
        raise type(error)(
            f"{error}; {out} is complete: it is the identity of {present.name}; "
            f"start it with {command_line('edge-agent', 'run', out)} "
            "or name another folder with --out"
        ) from None
    return write_joined_identity(out, reply, key, _trusted_ca(reply, token, ca))


def _present_identity(out: Path) -> Identity | None:
    """Return the identity in `out`; None if there is none, or if its files are damaged."""
    if not (out / IDENTITY_FILE).exists():
        return None
    try:
        return Identity.load(out)
    except IdentityError as error:
        log.warning("%s is made again: %s", out, error)
        return None


@contextmanager
def _request_key(out: Path, name: str) -> Iterator[bytes]:
    """Make the key of a request, and remove it again if the request is refused for good.

    After any other failure the key stays: the token may be bound to it by now.
    """
    is_new_folder = not out.exists()
    is_new_key = not (out / name).exists()
    key = own_key(out, name)
    try:
        yield key
    except IdentityError:
        with suppress(OSError):
            if is_new_key:
                (out / name).unlink()
            if is_new_folder:
                out.rmdir()
        raise


def _trusted_ca(reply: JoinReply, token: EnrolmentToken, ca: bytes) -> bytes:
    """Return the CA certificates of the reply, which the pinned one `ca` has verified."""
    received = reply.ca.encode()
    return received if contains_authority(received, token.ca_sha256) else ca


def own_key(out: Path, name: str = KEY_FILE) -> bytes:
    """Return the private key in `out` (mode 0600); make it if there is none, and the folder (0700).

    A damaged key is replaced.

    Raises:
        IdentityError: the key cannot be written.
    """
    path = out / name
    try:
        out.mkdir(parents=True, exist_ok=True, mode=0o700)
        key = create_file(path, new_key())
        if not is_key(key):
            move_aside(path, "it holds no P-256 private key")
            key = create_file(path, new_key())
    except OSError as error:
        raise _not_written(out, error) from None
    return key


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

        def fetch() -> bytes:
            try:
                return service.ca()
            except ServiceError:
                if _requires_certificate(server, unverified):
                    raise _broker_port(server) from None
                raise

        return retry_while_away(fetch, timeout_s=timeout_s, on_wait=log_wait)


def _requires_certificate(server: str, context: ssl.SSLContext) -> bool:
    """Whether a server refuses clients without a certificate, as brokers do.

    The refusal comes after the handshake. It is lost when data was sent meanwhile.
    """
    url = parse_url(server)
    address = (str(url.host).strip("[]"), url.port or 443)
    try:
        with (
            socket.create_connection(address, PROBE_S) as connection,
            context.wrap_socket(connection) as encrypted,
        ):
            encrypted.recv(1)
    except ssl.SSLError as error:
        return "CERTIFICATE_REQUIRED" in (error.reason or "")
    except OSError:
        return False
    return False


def _broker_port(server: str) -> ServiceError:
    return ServiceError(
        f"{server} demands a client's certificate, as a fleet's broker does: this is probably the "
        "broker's port; give the port of the service, as 'fleet enroll' prints it with the token"
    )


def trusting_only(ca: bytes) -> ssl.SSLContext:
    """Return a context for TLS 1.2 or later that trusts only the CA in PEM."""
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cadata=ca.decode())
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def write_joined_identity(out: Path, reply: JoinReply, key: bytes, ca: bytes) -> Identity:
    """Write the reply into `out`; bundles that are there already stay in their slots.

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
    identity = Identity(out, config)
    try:
        write_file(out / CA_FILE, ca, mode=0o644)
        replace_pair(out, certificate, key)
        (out / JOINING_KEY_FILE).unlink(missing_ok=True)
        save_desired(out, reply.config)
        slots = SlotStore(out)
        if slots.load().current is None:
            slots.save(Slots(current=reply.bundle_id))
        identity.save()
    except OSError as error:
        raise _not_written(out, error) from None
    return identity


def _not_written(out: Path, error: OSError) -> IdentityError:
    return IdentityError(
        f"cannot write an identity into {out}: {error.strerror}; name another folder with --out"
    )
