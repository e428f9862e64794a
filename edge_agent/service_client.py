"""The fleet's HTTPS service as a device sees it: join, renew, files of bundles."""

from __future__ import annotations

import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from types import TracebackType
from typing import Final, Self, TypeVar

import msgspec
import urllib3
from urllib3.exceptions import HTTPError, NewConnectionError, TimeoutError  # noqa: A004 (urllib3's)

from fleet.errors import ConfigError, DecodeError, FleetError, ServiceAwayError, ServiceError
from fleet.identity.identity import Identity
from fleet.protocol.enrolment_api import (
    BUNDLES_PATH,
    CA_PATH,
    JOIN_PATH,
    MAX_BODY_BYTES,
    RENEW_PATH,
    JoinReply,
    JoinRequest,
    RenewReply,
    RenewRequest,
    ServiceProblem,
    decode_body,
)
from fleet.utils.backoff import backoff_s

CONNECT_S: Final = 5.0
READ_S: Final = 20.0  # without a byte
PASSING: Final = (429, 502, 503, 504)
MAX_RETRY_AFTER_S: Final = 3600.0
NOT_YET_VALID = 9  # X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED of OpenSSL
EXPIRED = 10

T = TypeVar("T")


class ServiceClient:
    """One service at `url`, ``https://HOST:PORT``. Every call asks once and raises ServiceAwayError where asking again
    may help; `persistently` asks again."""

    def __init__(self, url: str, context: ssl.SSLContext, *, read_s: float = READ_S) -> None:
        """Raises ConfigError when `url` is no such URL."""
        self.url = check_url(url)
        timeout = urllib3.Timeout(connect=CONNECT_S, read=read_s)
        self._pool = urllib3.PoolManager(ssl_context=context, timeout=timeout, retries=False)

    @classmethod
    def of(cls, identity: Identity) -> ServiceClient:
        """The service of an identity's fleet, under its certificate.

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
        """The fleet's CA certificate in PEM, of whoever answers."""
        return self._call("GET", CA_PATH)

    def join(self, request: JoinRequest) -> JoinReply:
        return self._decode(self._call("POST", JOIN_PATH, msgspec.json.encode(request)), JoinReply)

    def renew(self, request: RenewRequest) -> RenewReply:
        return self._decode(
            self._call("POST", RENEW_PATH, msgspec.json.encode(request)), RenewReply
        )

    def small_file(self, bundle_id: str, name: str, max_bytes: int) -> bytes:
        """A file of a bundle that is known to have at most `max_bytes` bytes."""
        return self._call("GET", f"{BUNDLES_PATH}/{bundle_id}/{name}", max_bytes=max_bytes)

    @contextmanager
    def file(self, bundle_id: str, name: str, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """A file of a bundle from byte `start` on: where what comes begins, which may be 0, and the pieces of it."""
        with self._request("GET", f"{BUNDLES_PATH}/{bundle_id}/{name}", start=start) as response:
            begin = start if response.status == 206 else 0
            given = response.headers.get("Content-Range", f"bytes {start}-")
            if response.status == 206 and not given.startswith(f"bytes {start}-"):
                raise ServiceError(
                    f"expected {name} from byte {start} on, got {given[:80]!r}; the service is faulty"
                )
            yield begin, self._pieces(response)

    def close(self) -> None:
        self._pool.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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
                        f"{self.url}{path}: expected at most {max_bytes} bytes, and more came"
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

    def _pieces(self, response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
        try:
            yield from response.stream(1 << 16, decode_content=False)
        except HTTPError as error:
            raise self._explain(error) from None

    def _problem(self, response: urllib3.BaseHTTPResponse, path: str) -> FleetError:
        try:
            problem = decode_body(response.read(MAX_BODY_BYTES), ServiceProblem)
        except (DecodeError, HTTPError):
            problem = ServiceProblem(
                "", f"{self.url}{path} answered {response.status} {response.reason or ''}".strip()
            )
        if response.status in PASSING:
            return ServiceAwayError(
                problem.message, _retry_after_s(response.headers.get("Retry-After"))
            )
        return ERRORS.get(problem.code, ServiceError)(problem.message)

    def _decode(self, body: bytes, kind: type[T]) -> T:
        try:
            return decode_body(body, kind)
        except DecodeError as error:
            raise ServiceError(
                f"{self.url}: {error}; its software may be of another version than this"
            ) from None

    def _explain(self, error: HTTPError) -> ServiceError:
        """What went wrong below HTTP, and the next step."""
        cause = next(
            (each for each in (*error.args, error.__cause__) if isinstance(each, OSError)), None
        )
        if isinstance(error, NewConnectionError):
            why = cause.strerror if cause else error
            return ServiceAwayError(
                f"no connection to {self.url} ({why}); check the network, the address and the port"
            )
        if isinstance(cause, ssl.SSLEOFError | ConnectionError):
            return ServiceAwayError(
                f"{self.url} closed the connection, as it does when it stops, or when our certificate has expired, was "
                "revoked or is another fleet's; if that lasts, check the clock, or join again with a new token"
            )
        if isinstance(cause, ssl.SSLError):
            return ServiceError(f"no connection to {self.url}: {_explain_tls(cause)}")
        if isinstance(error, TimeoutError):
            return ServiceAwayError(
                f"{self.url} did not answer in time; check the network and the address"
            )
        return ServiceAwayError(f"no connection to {self.url} ({error}); check the network")


def persistently(
    call: Callable[[], T], *, timeout_s: float, stop: threading.Event | None = None
) -> T:
    """What `call` gives; asked again, with back-off, while it raises ServiceAwayError and `timeout_s` have not passed.

    Raises:
        ServiceAwayError: the time has passed, or `stop` was set.
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
            num_failures += 1


def check_url(url: str) -> str:
    """`url` without a slash at its end; raises ConfigError when it is not ``https://HOST:PORT``."""
    try:
        parsed = urllib3.util.parse_url(url)
    except HTTPError:
        parsed = urllib3.util.Url()
    if (
        parsed.scheme != "https"
        or not parsed.host
        or parsed.path not in (None, "/")
        or parsed.query
        or parsed.auth
    ):
        raise ConfigError(
            f"service {url[:200]!r}: expected https://HOST:PORT, as 'fleet enroll' prints it"
        )
    return url.rstrip("/")


def _explain_tls(error: ssl.SSLError) -> str:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    match error:
        case ssl.SSLCertVerificationError(verify_code=code) if code == NOT_YET_VALID:
            return f"its certificate is not valid yet by this machine's clock ({now}), which is behind; set the clock"
        case ssl.SSLCertVerificationError(verify_code=code) if code == EXPIRED:
            return (
                f"its certificate has expired by this machine's clock ({now}); set the clock if it is wrong, else the "
                "fleet's operator has to start the service again"
            )
        case ssl.SSLCertVerificationError():
            return (
                f"its certificate is not what we trust ({error.verify_message}): somebody may be in between, or it is "
                "another fleet's service; check the address"
            )
        case _ if "CERTIFICATE" in (error.reason or ""):
            return (
                f"it does not take our certificate ({error.reason}): it expired, was revoked or is another fleet's; "
                "check the clock, or join again with a new token"
            )
        case _:
            return f"TLS failed ({error.reason or error}); check that the port is the service's"


def _retry_after_s(header: str | None) -> float:
    """Seconds of a Retry-After header; 0 where there is none, or a date."""
    return (
        min(float(header), MAX_RETRY_AFTER_S)
        if header and header.isascii() and header.isdigit()
        else 0.0
    )


def _all_kinds(kind: type[FleetError]) -> Iterator[type[FleetError]]:
    for each in kind.__subclasses__():
        yield each
        yield from _all_kinds(each)


ERRORS: Final = {kind.code: kind for kind in _all_kinds(FleetError)}
"""Our errors by the code that travels."""
