"""Access to a fleet through the API of its server."""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Final, Self

import msgspec
import urllib3
from msgspec import Struct
from urllib3.exceptions import HTTPError, NewConnectionError, TimeoutError  # noqa: A004 (urllib3's)

from fleet.errors import ConfigError, CredentialsError, FleetError, ServiceAwayError, ServiceError
from fleet.http_api.api_address import ApiAddress
from fleet.identity.service_client import ERRORS
from fleet.identity.tls_errors import explain_certificate
from fleet.operator_api.fleet_access import FleetAccess
from fleet.operator_api.operation import Operation, Request, Response
from fleet.operator_api.request_codec import encode_request
from fleet.utils.validation import JSON_ERRORS

CONNECT_S: Final = 10.0
CALL_S: Final = 90.0
"""Seconds for a whole call; the server gives up after 60."""

MAX_RESPONSE_BYTES: Final = 64 << 20
OPERATOR_KEY: Final = re.compile(r"fleet-operator-[A-Za-z0-9_-]{16,200}")


class RemoteProblem(Struct, frozen=True):
    """An error of the API."""

    code: str
    message: str


class RemoteProblemBody(Struct, frozen=True):
    """The body of a response that failed."""

    error: RemoteProblem


class RemoteAccess(FleetAccess):
    """Access with an operator's key. Any thread may use it."""

    max_page: ClassVar[int] = 1000

    def __init__(self, url: str, key: str, ca: Path | None = None) -> None:
        """Store the values. `ca` has the only certificates to trust, by default the system's.

        Raises:
            ConfigError: the URL is not usable, or would send the key over a network in the clear.
            CredentialsError: that is no key of an operator.
        """
        self._url = check_server_url(url)
        if not OPERATOR_KEY.fullmatch(key):
            raise CredentialsError(
                "that is no key of an operator: expected fleet-operator-..., as the fleet's server "
                "printed it"
            )
        self._headers = {"Authorization": f"Bearer {key}", "Accept": "application/json"}
        self._pool = urllib3.PoolManager(ssl_context=_trust(ca), retries=False)

    def call(self, operation: Operation[Request, Response], request: Request) -> Response:
        parts = encode_request(operation, request)
        deadline = time.monotonic() + CALL_S
        timeout = urllib3.Timeout(connect=CONNECT_S, total=CALL_S)
        try:
            with self._send(operation.method, parts.path, parts.body, timeout) as response:
                body = self._read(response, deadline)
                if response.status != 200:
                    raise self._error(response.status, body)
        except HTTPError as error:
            raise self._explain(error) from None
        return self.decode(body, operation.response)

    @contextmanager
    def stream(
        self, method: str, path: str, body: bytes, silence_s: float
    ) -> Iterator[Iterator[bytes]]:
        """Send a request, and yield the pieces of its response as they arrive.

        The end of the block closes the connection unless the response is complete.

        Raises:
            ServiceAwayError: the server cannot be reached, or sends nothing for `silence_s`
                seconds.
            FleetError: as the server's API.
        """
        timeout = urllib3.Timeout(connect=CONNECT_S, read=silence_s)
        try:
            with self._send(method, path, body, timeout) as response:
                if response.status != 200:
                    deadline = time.monotonic() + CALL_S
                    raise self._error(response.status, self._read(response, deadline))
                yield self._pieces(response)
        except HTTPError as error:
            raise self._explain(error) from None

    def _pieces(self, response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
        try:
            yield from response.stream(1 << 16, decode_content=True)
        except HTTPError:
            raise self.cut_off() from None

    def cut_off(self) -> ServiceAwayError:
        """Return the error of a stream that ends before its time."""
        return ServiceAwayError(
            f"the connection to {self._url} ended in the midst of the response; check the network, "
            "and try again"
        )

    def _send(
        self, method: str, path: str, body: bytes | None, timeout: urllib3.Timeout
    ) -> urllib3.BaseHTTPResponse:
        """Send a request; the body of the response is not read yet. Raises HTTPError."""
        is_json = {"Content-Type": "application/json"} if body is not None else {}
        return self._pool.request(
            method,
            self._url + path,
            body=body,
            headers=self._headers | is_json,
            redirect=False,
            preload_content=False,
            timeout=timeout,
        )

    def close(self) -> None:
        """Close the connections."""
        self._pool.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, response: urllib3.BaseHTTPResponse, deadline: float) -> bytes:
        body = bytearray()
        for piece in response.stream(1 << 16, decode_content=True):
            body += piece
            if len(body) > MAX_RESPONSE_BYTES:
                raise ServiceError(
                    f"{self._url}: expected at most {MAX_RESPONSE_BYTES} bytes, got more"
                )
            if time.monotonic() > deadline:
                raise ServiceAwayError(f"{self._url} did not answer within {CALL_S:g} s; try later")
        return bytes(body)

    def decode(self, body: bytes, type_: type[Response]) -> Response:
        """Return a value that the server sent as JSON. Raises ServiceError."""
        try:
            return msgspec.json.decode(body, type=type_)
        except JSON_ERRORS as error:
            raise ServiceError(
                f"{self._url}: {error}; its software may have another version than this one"
            ) from None

    def _error(self, status: int, body: bytes) -> FleetError:
        """Return the error of a response: of the class that the operation raised there."""
        try:
            problem = msgspec.json.decode(body, type=RemoteProblemBody).error
        except JSON_ERRORS:
            return ServiceError(
                f"{self._url} answered {status}, as no server of a fleet does; check the address"
            )
        return problem_error(problem)

    def _explain(self, error: HTTPError) -> ServiceError:
        causes = (each for each in (*error.args, error.__cause__) if isinstance(each, OSError))
        cause = next(causes, None)
        if isinstance(cause, ssl.SSLCertVerificationError):
            reason = explain_certificate(cause).partition("; check the address")[0]
            return ServiceError(
                f"no connection to {self._url}: {reason}; check the address, and name the fleet's "
                "ca.pem with --ca-file"
            )
        if isinstance(error, NewConnectionError):
            reason = (cause.strerror if cause else None) or str(error)
            return ServiceAwayError(
                f"no connection to {self._url} ({reason}); check the network, the address and the "
                "port"
            )
        if isinstance(error, TimeoutError):
            return ServiceAwayError(f"{self._url} did not answer in time; check the network")
        return ServiceAwayError(f"no connection to {self._url} ({error}); check the network")


def problem_error(problem: RemoteProblem) -> FleetError:
    """Return an error of the API: of the class that was raised there."""
    return ERRORS.get(problem.code, ServiceError)(problem.message)


def check_server_url(url: str) -> str:
    """Return the URL of a fleet's server, without a slash at its end.

    Raises:
        ConfigError: it is none, or it has no TLS, and the host is not this machine.
    """
    try:
        parsed = urllib3.util.parse_url(url)
    except HTTPError:
        parsed = urllib3.util.Url()
    is_base = parsed.path in (None, "/") and not parsed.query and not parsed.auth
    if parsed.scheme not in ("http", "https") or not parsed.host or not is_base:
        raise ConfigError(f"server {url[:200]!r}: expected https://HOST:PORT, as --console has it")
    if parsed.scheme == "http" and not ApiAddress(parsed.host.strip("[]"), 0).is_local:
        raise ConfigError(
            f"server {url[:200]!r}: without TLS the network could read the key; use https"
        )
    return url.rstrip("/")


def _trust(ca: Path | None) -> ssl.SSLContext:
    """Return a TLS context that trusts a file's certificates alone, or the system's."""
    try:
        return ssl.create_default_context(cafile=None if ca is None else str(ca))
    except OSError as error:
        raise ConfigError(
            f"{ca} has no usable certificates ({error.strerror or error}); give the fleet's ca.pem"
        ) from None
