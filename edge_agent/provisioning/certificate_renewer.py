"""A new key and certificate at two thirds of a certificate's life, without an end of service."""

from __future__ import annotations

import logging
import random
import ssl
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from edge_agent.provisioning.credentials import (
    check_certificate,
    lifetime,
    new_key,
    signing_request,
)
from edge_agent.service_client import ServiceClient, persistently
from fleet.errors import FleetError, IdentityError
from fleet.identity.certificate_rotation import finish_renewal, renewal_in_s, replace_pair
from fleet.identity.identity import CA_FILE, CERT_FILE, Identity
from fleet.protocol.enrolment_api import RenewRequest

ASK_S: Final = 60.0
CHECK_S: Final = 600.0  # a clock may be set meanwhile
RETRY_S: Final = (1.0, CHECK_S)
STOP_S: Final = 5.0

log = logging.getLogger(__name__)


def retry_in_s(not_after: float, now: float, draw: float) -> float:
    """Seconds until the next try: about a twentieth of what is left of its life, within `RETRY_S`."""
    shortest, longest = RETRY_S
    return min(longest, max(shortest, (not_after - now) / 20 * (0.5 + draw)))


def renew(identity: Identity, key: bytes, stop: threading.Event | None = None) -> None:
    """Has a certificate made for the new `key`, and puts both in the place of the old ones.

    Raises:
        ConfigError: the identity names no service.
        IdentityError: we are refused, or what came is not ours, or cannot be written.
        ServiceError: the service cannot be reached.
    """
    with ServiceClient.of(identity) as service:
        request = RenewRequest(signing_request(key, identity.name))
        reply = persistently(lambda: service.renew(request), timeout_s=ASK_S, stop=stop)
    certificate = reply.certificate.encode()
    try:
        check_certificate(
            certificate, key, (identity.folder / CA_FILE).read_bytes(), identity.name, time.time()
        )
        replace_pair(identity.folder, certificate, key)
    except OSError as error:
        raise IdentityError(
            f"cannot renew in {identity.folder}: {error.strerror}; the old certificate stays"
        ) from None


class Renewer:
    """Renews an identity while it is used. `on_renewed` is to load it again; whatever fails, the old one serves on."""

    def __init__(self, identity: Identity, on_renewed: Callable[[], None]) -> None:
        self._identity = identity
        self._on_renewed = on_renewed
        self._key = b""  # of the request under way: whoever asks again asks for the same
        self._draw = random.random()
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name=f"renew-{identity.name}", daemon=True
        )

    def __enter__(self) -> Self:
        """Begins, unless the identity names no service: then it is renewed by hand."""
        if self._identity.config.server:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(STOP_S)

    def _run(self) -> None:
        wait_s = 0.0
        while not self._stop.wait(min(wait_s, CHECK_S)):
            try:
                wait_s = self._check()
            except (FleetError, OSError, ssl.SSLError) as error:
                log.warning(
                    "the certificate of %s is not renewed: %s; it is tried again",
                    self._identity.name,
                    error,
                )
                wait_s = self._retry_s()
            except Exception:  # the outermost boundary of a thread
                log.exception("the certificate of %s is not renewed", self._identity.name)
                wait_s = CHECK_S

    def _check(self) -> float:
        """Renews when it is due; seconds until it may be due again."""
        finish_renewal(self._identity.folder)
        wait_s = renewal_in_s(*self._lifetime(), time.time(), self._draw)
        if wait_s > 0:
            return wait_s
        self._key = self._key or new_key()
        renew(self._identity, self._key, self._stop)
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
