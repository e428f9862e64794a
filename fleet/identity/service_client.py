"""A device's client of the fleet's HTTPS service: joining, renewal, files of bundles."""

from __future__ import annotations

import logging
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Self, TypeVar

import msgspec
import urllib3
from urllib3.exceptions import HTTPError, NewConnectionError, TimeoutError  # noqa: A004 (urllib3's)

from fleet.errors import ConfigError, DecodeError, FleetError, ServiceAwayError, ServiceError
from fleet.identity.identity import Identity
from fleet.identity.tls_errors import depends_on_clock, explain_certificate
from fleet.protocol.enrolment_api import (
    BUNDLES_PATH,
    CA_PATH,
    JOIN_PATH,
    MAX_BODY_BYTES,
    RENEW_PATH,
    SOFTWARE_PATH,
    JoinReply,
    JoinRequest,
    RenewReply,
    RenewRequest,
    ServiceProblem,
    decode_body,
)
from fleet.utils.backoff import backoff_s
from fleet.utils.host_address import check_host

CONNECT_S: Final = 5.0
READ_S: Final = 20.0  # between two bytes
TEMPORARY: Final = (429, 502, 503, 504)
MAX_RETRY_AFTER_S: Final = 3600.0

T = TypeVar("T")

log = logging.getLogger(__name__)


class ServiceClient:
    """A client of the service at `url`, ``https://HOST:PORT``.

    Each call sends one request, and raises ServiceAwayError if another attempt may succeed;
    `retry_while_away` repeats it.
    """

    def __init__(self, url: str, context: ssl.SSLContext, *, read_s: float = READ_S) -> None:
        """Check the URL. Raises ConfigError."""
        self.url = check_url(url)
        timeout = urllib3.Timeout(connect=CONNECT_S, read=read_s)
        self._pool = urllib3.PoolManager(ssl_context=context, timeout=timeout, retries=False)

    @classmethod
    def of(cls, identity: Identity) -> ServiceClient:
        """Make a client of the service of an identity's fleet, with its certificate.

        Raises:
            ConfigError: the identity names no service.
            IdentityError: its files do not load.
        """
        if identity.config.server is None:
            raise ConfigError(
                f"{identity.folder} names no service of its fleet; join it with 'edge-agent join'"
            )
        return cls(identity.config.server, identity.ssl_context())

    def ca(self) -> bytes:
        """Fetch the fleet's CA certificate in PEM."""
        return self._call("GET", CA_PATH)

    def join(self, request: JoinRequest) -> JoinReply:
        body = self._call("POST", JOIN_PATH, msgspec.json.encode(request))
        return self._decode(body, JoinReply)

    def renew(self, request: RenewRequest) -> RenewReply:
        body = self._call("POST", RENEW_PATH, msgspec.json.encode(request))
        return self._decode(body, RenewReply)

    def small_file(self, bundle_id: str, name: str, max_bytes: int) -> bytes:
        """Fetch a file of a bundle that has at most `max_bytes` bytes."""
        return self._call("GET", f"{BUNDLES_PATH}/{bundle_id}/{name}", max_bytes=max_bytes)

    def software_file(self, version: str, name: str, max_bytes: int) -> bytes:
        """Fetch a file of a version of the software that has at most `max_bytes` bytes."""
        return self._call("GET", f"{SOFTWARE_PATH}/{version}/{name}", max_bytes=max_bytes)

    @contextmanager
    def file(self, bundle_id: str, name: str, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Fetch a file of a bundle from byte `start` on.

        Yield the position at which the data begins, which may also be 0, and the data in pieces.
        """
        with self._request("GET", f"{BUNDLES_PATH}/{bundle_id}/{name}", start=start) as response:
            if response.status == 206:
                self._check_range(response, name, start)
                yield start, self._pieces(response)
            else:
                yield 0, self._pieces(response)

    def close(self) -> None:
        self._pool.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(
        self, method: str, path: str, body: bytes | None = None, max_bytes: int = MAX_BODY_BYTES
    ) -> bytes:
        with self._request(method, path, body) as response:
            data = bytearray()
            for piece in self._pieces(response):
                data += piece
                if len(data) > max_bytes:
                    raise ServiceError(
                        f"{self.url}{path}: expected at most {max_bytes} bytes, got more"
                    )
            return bytes(data)

    @contextmanager
    def _request(
        self, method: str, path: str, body: bytes | None = None, start: int = 0
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        headers = {"Content-Type": "application/json"} if body else {}
        if start:
            headers["Range"] = f"bytes={start}-"
        try:
            response = self._pool.request(
                method,
                self.url + path,
                body=body,
                headers=headers,
                redirect=False,
                preload_content=False,
            )
        except HTTPError as error:
            raise self._explain(error) from None
        try:
            if response.status not in (200, 206):
                raise self._problem(response, path)
            yield response
        finally:
            response.close()

    def _check_range(self, response: urllib3.BaseHTTPResponse, name: str, start: int) -> None:
        content_range = response.headers.get("Content-Range", f"bytes {start}-")
        if not content_range.startswith(f"bytes {start}-"):
            raise ServiceError(
                f"expected {name} from byte {start} on, got {content_range[:80]!r}; "
                "the service is faulty"
            )

    def _pieces(self, response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
        try:
            yield from response.stream(1 << 16, decode_content=False)
        except HTTPError as error:
            raise self._explain(error) from None

    def _problem(self, response: urllib3.BaseHTTPResponse, path: str) -> FleetError:
        try:
            problem = decode_body(response.read(MAX_BODY_BYTES), ServiceProblem)
        except (DecodeError, HTTPError):
            message = f"{self.url}{path} answered {response.status} {response.reason or ''}"
            problem = ServiceProblem("", message.strip())
        if response.status in TEMPORARY:
            retry_after_s = _retry_after_s(response.headers.get("Retry-After"))
            return ServiceAwayError(problem.message, retry_after_s)
        return ERRORS.get(problem.code, ServiceError)(problem.message)

    def _decode(self, body: bytes, kind: type[T]) -> T:
        try:
            return decode_body(body, kind)
        except DecodeError as error:
            raise ServiceError(
                f"{self.url}: {error}; its software may have another version than this device"
            ) from None

    def _explain(self, error: HTTPError) -> ServiceError:
        """Return an error with the cause of a failure below HTTP, and the next step."""
        causes = (each for each in (*error.args, error.__cause__) if isinstance(each, OSError))
        cause = next(causes, None)
        if isinstance(error, NewConnectionError):
            reason = cause.strerror if cause else error
            return ServiceAwayError(
                f"no connection to {self.url} ({reason}); "
                "check the network, the address and the port"
            )
        if isinstance(cause, ssl.SSLEOFError | ConnectionError):
            return ServiceAwayError(
                f"{self.url} closed the connection, as it does when it stops, or when our "
                "certificate has expired, was revoked or is another fleet's; "
                "if that lasts, check the clock, or join again with a new token"
            )
        if isinstance(cause, ssl.SSLError):
            kind = ServiceAwayError if depends_on_clock(cause) else ServiceError
            return kind(f"no connection to {self.url}: {_explain_tls(cause)}")
        if isinstance(error, TimeoutError):
            return ServiceAwayError(
                f"{self.url} did not answer in time; check the network and the address"
            )
        return ServiceAwayError(f"no connection to {self.url} ({error}); check the network")


def retry_while_away(
    call: Callable[[], T],
    *,
    timeout_s: float,
    stop: threading.Event | None = None,
    on_wait: Callable[[ServiceAwayError], None] = lambda _: None,
) -> T:
    """Call `call`, and repeat it with back-off while it raises ServiceAwayError.

    `on_wait` is called once, with the first of these errors, before the first repetition.

    Raises:
        ServiceAwayError: `timeout_s` seconds have passed, or `stop` was set.
    """
    deadline = time.monotonic() + timeout_s
    stop = stop or threading.Event()
    num_failures = 0
    while True:
        try:
            return call()
        except ServiceAwayError as error:
            wait_s = max(backoff_s(num_failures, random.random()), error.retry_after_s)
            if time.monotonic() + wait_s >= deadline or stop.wait(wait_s):
                raise
            if num_failures == 0:
                on_wait(error)
            num_failures += 1


def log_wait(error: ServiceAwayError) -> None:
    """Log that a request is repeated; the `on_wait` of commands."""
    log.warning("%s; trying again", error)


def check_url(url: str) -> str:
    """Return `url` without a trailing slash. Raises ConfigError unless it is ``https://HOST:PORT``."""
    try:
        parsed = urllib3.util.parse_url(url)
    except HTTPError:
        parsed = urllib3.util.Url()
    is_base = parsed.path in (None, "/") and not parsed.query and not parsed.auth
    if parsed.scheme != "https" or not parsed.host or not is_base:
        raise ConfigError(
            f"service {url[:200]!r}: expected https://HOST:PORT, as 'fleet enroll' prints it"
        )
    try:
        check_host(parsed.host.strip("[]"))
    except ValueError as error:
        raise ConfigError(f"service {url[:200]!r}: {error}") from None
    return url.rstrip("/")


def _explain_tls(error: ssl.SSLError) -> str:
    match error:
        case ssl.SSLCertVerificationError():
            return explain_certificate(error)
        case _ if "CERTIFICATE" in (error.reason or ""):
            return (
                f"it does not accept our certificate ({error.reason}): it expired, was revoked or "
                "is another fleet's; check the clock, or join again with a new token"
            )
        case _:
            return f"TLS failed ({error.reason or error}); check that the port is the service's"


def _retry_after_s(header: str | None) -> float:
    """Return the seconds of a Retry-After header; 0 if there is none or it is a date."""
    is_number = header and header.isascii() and header.isdigit()
    return min(float(header or 0), MAX_RETRY_AFTER_S) if is_number else 0.0


def _subclasses(error: type[FleetError]) -> Iterator[type[FleetError]]:
    for subclass in error.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


ERRORS: Final[dict[str, type[FleetError]]] = {
    error.code: error for error in _subclasses(FleetError) if "code" in vars(error)
}
"""The error classes by their code on the wire."""
