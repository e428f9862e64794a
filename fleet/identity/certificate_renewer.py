"""Renewal of an identity's key and certificate at two thirds of its life, while it is in use."""

from __future__ import annotations

import logging
import random
import ssl
import threading
import time
from collections.abc import Callable
from typing import Final, Self

from fleet.errors import FleetError, IdentityError
from fleet.identity.certificate_rotation import finish_renewal, renewal_in_s, replace_pair
from fleet.identity.credentials import (
    check_certificate,
    lifetime,
    new_key,
    signing_request,
)
from fleet.identity.identity import CA_FILE, CERT_FILE, Identity
from fleet.identity.service_client import ServiceClient, retry_while_away
from fleet.protocol.enrolment_api import RenewReply, RenewRequest
from fleet.utils.atomic_files import write_file

REQUEST_S: Final = 60.0
CHECK_S: Final = 600.0  # a clock may be set in the meantime
RETRY_S: Final = (1.0, CHECK_S)
STOP_S: Final = 5.0

log = logging.getLogger(__name__)


def retry_in_s(not_after: float, now: float, draw: float) -> float:
    """Return the seconds until the next attempt.

    That is about a twentieth of the remaining life, within `RETRY_S`.
    """
    shortest, longest = RETRY_S
    return min(longest, max(shortest, (not_after - now) / 20 * (0.5 + draw)))


def renew_certificate(identity: Identity, key: bytes, stop: threading.Event | None = None) -> None:
    """Request a certificate for the new `key`, and replace the old pair by the new one.

    `ca.pem` is replaced, too, when the service names other CA certificates.

    Raises:
        ConfigError: the identity names no service.
        IdentityError: the service refuses, or the certificate is not ours or cannot be written.
        ServiceError: the service cannot be reached.
    """
    with ServiceClient.of(identity) as service:
        request = RenewRequest(signing_request(key, identity.name))
        reply = retry_while_away(lambda: service.renew(request), timeout_s=REQUEST_S, stop=stop)
    try:
        _store(identity, reply, key)
    except OSError as error:
        raise IdentityError(
            f"cannot renew in {identity.folder}: {error.strerror}; the old certificate stays"
        ) from None


def _store(identity: Identity, reply: RenewReply, key: bytes) -> None:
    """Check and store a reply, `ca.pem` first: it verifies the old certificate, too."""
    certificate = reply.certificate.encode()
    present_ca = (identity.folder / CA_FILE).read_bytes()
    ca = reply.ca.encode() if reply.ca else present_ca
    check_certificate(certificate, key, ca, identity.name, time.time())
    if ca != present_ca:
        write_file(identity.folder / CA_FILE, ca, mode=0o644)
    replace_pair(identity.folder, certificate, key)


def renew_if_due(identity: Identity, *, at_once: bool = False) -> bool:
    """Renew an identity that no process renews, if it is due or `at_once`; return whether it was.

    Raises:
        ConfigError, IdentityError, ServiceError: as `renew_certificate`.
    """
    try:
        finish_renewal(identity.folder)
        certificate = (identity.folder / CERT_FILE).read_bytes()
    except OSError as error:
        raise IdentityError(
            f"cannot use {identity.folder}: {error.strerror}; check the folder's rights"
        ) from None
    if not at_once and renewal_in_s(*lifetime(certificate), time.time()) > 0:
        return False
    renew_certificate(identity, new_key())
    return True


class CertificateRenewer:
    """The renewal of an identity in use, on its own thread.

    `on_renewed` must load the identity again. The old certificate stays in use after a failure.
    """

    def __init__(self, identity: Identity, on_renewed: Callable[[], None]) -> None:
        self._identity = identity
        self._on_renewed = on_renewed
        self._key = b""  # the key of the pending request; a repeated request has the same key
        self._draw = random.random()
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name=f"renew-{identity.name}", daemon=True
        )

    def __enter__(self) -> Self:
        """Start, unless the identity names no service and is therefore renewed by hand."""
        if self._identity.config.server:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(STOP_S)

    def _run(self) -> None:
        wait_s = 0.0
        while not self._stop.wait(min(wait_s, CHECK_S)):
            try:
                wait_s = self._check()
            except (FleetError, OSError, ssl.SSLError) as error:
                name = self._identity.name
                log.warning("the certificate of %s is not renewed: %s; will retry", name, error)
                wait_s = self._retry_s()
            except Exception:  # the outermost boundary of a thread
                log.exception("the certificate of %s is not renewed", self._identity.name)
                wait_s = CHECK_S

    def _check(self) -> float:
        """Renew if due; return the seconds until the next renewal may be due."""
        finish_renewal(self._identity.folder)
        wait_s = renewal_in_s(*self._lifetime(), time.time(), self._draw)
        if wait_s > 0:
            return wait_s
        self._key = self._key or new_key()
        renew_certificate(self._identity, self._key, self._stop)
        self._key = b""
        self._draw = random.random()
        log.info("the certificate of %s is renewed", self._identity.name)
        self._on_renewed()
        return renewal_in_s(*self._lifetime(), time.time(), self._draw)

    def _retry_s(self) -> float:
        try:
            return retry_in_s(self._lifetime()[1], time.time(), random.random())
        except (FleetError, OSError):
            return CHECK_S

    def _lifetime(self) -> tuple[float, float]:
        return lifetime((self._identity.folder / CERT_FILE).read_bytes())
