"""How a device joins its fleet: a token in, an identity folder out, and a key that never leaves the device."""

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
from edge_agent.service_client import ServiceClient, check_url, persistently
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


def join(token: EnrolmentToken, server: str, out: Path, *, timeout_s: float = JOIN_S) -> Identity:
    """Joins the fleet whose service is at `server`, and writes the identity folder `out`; `identity.json` comes last.

    The key is on disk before anybody is asked, so that whoever lost the reply asks again with the same key, and gets
    the same certificate for the same token. The bundle that the fleet wants is noted, not fetched.

    Raises:
        ConfigError: `server` is no ``https://HOST:PORT``, or speaks another protocol.
        IdentityError: `out` is an identity already or cannot be written, or the token or what came is not good.
        ServiceError: the service cannot be reached, or is not the one that the token is of.
    """
    server = check_url(server)
    if (out / IDENTITY_FILE).exists():
        raise IdentityError(
            f"{out} is complete: it is the identity of {Identity.load(out).name}; start it with 'edge-agent run {out}' "
            "or name another folder with --out"
        )
    deadline = time.monotonic() + timeout_s
    key = own_key(out)
    ca = pinned_ca(server, token.ca_sha256, timeout_s)
    request = JoinRequest(token.id, token.secret, signing_request(key))
    with ServiceClient(server, trusting_only(ca)) as service:
        reply = persistently(lambda: service.join(request), timeout_s=deadline - time.monotonic())
    return write_identity(out, reply, key, ca)


def own_key(out: Path) -> bytes:
    """The private key in `out` (mode 0600, in a folder of 0700), made now if there is none. Raises IdentityError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        out.chmod(0o700)
        return create_file(out / KEY_FILE, new_key())
    except OSError as error:
        raise _not_written(out, error) from None


def pinned_ca(server: str, ca_sha256: str, timeout_s: float) -> bytes:
    """The CA certificate in PEM whose SHA-256 the token has; asked of somebody whom nobody has vouched for yet.

    Raises:
        ServiceError: it is another one.
    """
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anybody.check_hostname = False
    anybody.verify_mode = ssl.CERT_NONE
    with ServiceClient(server, anybody) as service, warnings.catch_warnings():
        warnings.simplefilter("ignore", InsecureRequestWarning)  # the hash decides
        ca = persistently(service.ca, timeout_s=timeout_s)
    try:
        found = fingerprint(ca)
    except IdentityError as error:
        raise ServiceError(
            f"{server} is no service of a fleet: {error}; check the address and the port"
        ) from None
    if found != ca_sha256:
        raise ServiceError(
            f"{server} has another CA than the token says (SHA-256 {found[:16]}..., expected {ca_sha256[:16]}...): "
            "somebody may be in between, or it is another fleet's address; nothing was sent, the token is still good"
        )
    return only_first(ca)


def trusting_only(ca: bytes) -> ssl.SSLContext:
    """TLS 1.2 or later, and no other CA than the one in PEM is trusted."""
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cadata=ca.decode())
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def write_identity(out: Path, reply: JoinReply, key: bytes, ca: bytes) -> Identity:
    """Writes what came into `out`, where the key is already.

    Raises:
        ConfigError: the fleet speaks another protocol.
        IdentityError: the certificate is not ours, or the folder cannot be written.
    """
    if reply.topic_prefix != PREFIX:
        raise ConfigError(
            f"this fleet speaks {reply.topic_prefix[:80]!r}, this device {PREFIX!r}; install the fleet's version here"
        )
    certificate = reply.certificate.encode()
    check_certificate(certificate, key, ca, reply.name, time.time())
    identity = Identity(
        out,
        IdentityConfig(
            name=reply.name,
            role=reply.role,
            host=reply.host,
            port=reply.port,
            shared_subscriptions=reply.shared_subscriptions,
            server=check_url(reply.server),
        ),
    )
    try:
        write_file(out / CERT_FILE, certificate, mode=0o644)
        write_file(out / CA_FILE, ca, mode=0o644)
        save_desired(out, reply.config)
        SlotStore(out).save(Slots(current=reply.bundle_id))
        config = msgspec.json.format(msgspec.json.encode(identity.config), indent=2) + b"\n"
        write_file(out / IDENTITY_FILE, config, mode=0o644)
    except OSError as error:
        raise _not_written(out, error) from None
    return identity


def _not_written(out: Path, error: OSError) -> IdentityError:
    return IdentityError(
        f"cannot write an identity into {out}: {error.strerror}; name another folder with --out"
    )
