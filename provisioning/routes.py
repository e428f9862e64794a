"""The HTTP routes of the service: paths, limits and deadlines of an `EnrolmentService`."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import re
import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, TypeVar

import msgspec
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from fleet.errors import BusyError, DecodeError, FleetError, OversizedError, RegistryError
from fleet.protocol.enrolment_api import (
    BUNDLES_PATH,
    CA_PATH,
    CRL_PATH,
    JOIN_PATH,
    MAX_BODY_BYTES,
    RENEW_PATH,
    SOFTWARE_PATH,
    JoinRequest,
    RenewRequest,
    decode_body,
)
from provisioning.enrolment_service import EnrolmentService
from provisioning.http_errors import error_response, http_error_response, status_of
from provisioning.rate_limit import RateLimit, peer_key

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
T = TypeVar("T")

ANSWER_S: Final = 60.0
DOWNLOAD_S: Final = 3600.0  # afterwards a device requests the rest of the file
RANGE: Final = re.compile(
    r"bytes=(?:(?P<first>\d+)-(?P<last>\d*)|-(?P<suffix>\d+))", re.ASCII | re.IGNORECASE
)
MAX_FILE_BYTES: Final = 1 << 62
PEM: Final = "application/x-pem-file"

log = logging.getLogger(__name__)


class Routes:
    """The handlers of one application; all blocking calls run in threads."""

    def __init__(
        self,
        service: EnrolmentService,
        joins: RateLimit,
        renewals: RateLimit,
        body_timeout_s: float,
    ) -> None:
        self._service = service
        self._body_timeout_s = body_timeout_s
        self._joins = joins
        self._renewals = renewals

    def application(self) -> web.Application:
        """Return the application for aiohttp."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[errors_to_responses])
        app.router.add_get(CA_PATH, self._ca)
        app.router.add_get(CRL_PATH, self._crl)
        app.router.add_post(JOIN_PATH, self._join)
        app.router.add_post(RENEW_PATH, self._renew)
        app.router.add_get(BUNDLES_PATH + "/{bundle_id}/{name:.+}", self._bundle_file)
        app.router.add_get(SOFTWARE_PATH + "/{version}/{name}", self._software_file)
        return app

    async def _ca(self, _: web.Request) -> web.Response:
        return web.Response(text=self._service.authority.pem, content_type=PEM)

    async def _crl(self, _: web.Request) -> web.Response:
        crl = await in_thread(self._service.crl)
        if crl is None:
            raise web.HTTPNotFound
        return web.Response(text=crl, content_type=PEM)

    async def _join(self, request: web.Request) -> web.Response:
        peer = peer_address(request)
        join = partial(self._service.join, peer=peer)
        return await self._answer(request, self._joins, JoinRequest, join)

    async def _renew(self, request: web.Request) -> web.Response:
        fingerprint = client_fingerprint(request)
        renew = partial(self._service.renew, fingerprint=fingerprint)
        return await self._answer(request, self._renewals, RenewRequest, renew)

    async def _answer(
        self,
        request: web.Request,
        limit: RateLimit,
        kind: type[T],
        work: Callable[[T], msgspec.Struct],
    ) -> web.Response:
        """Respond to a request within the peer's rate limit.

        A request that succeeds does not count: a hundred devices behind one address may join, but
        no client can guess tokens.
        """
        peer = peer_key(peer_address(request))
        if wait_s := limit.wait_s(peer):
            return too_many_requests(wait_s)
        reply = await in_thread(work, await read_body(request, kind, self._body_timeout_s))
        limit.refund(peer)
        return web.Response(body=msgspec.json.encode(reply), content_type="application/json")

    async def _bundle_file(self, request: web.Request) -> web.StreamResponse:
        bundle_id = request.match_info["bundle_id"]
        name = request.match_info["name"]
        path = await in_thread(
            self._service.bundle_file, bundle_id, name, client_fingerprint(request)
        )
        return TimedFile(path)

    async def _software_file(self, request: web.Request) -> web.StreamResponse:
        version = request.match_info["version"]
        name = request.match_info["name"]
        path = await in_thread(
            self._service.software_file, version, name, client_fingerprint(request)
        )
        return TimedFile(path)


class TimedFile(web.FileResponse):
    """A file, or the requested range of it, that must be downloaded in `DOWNLOAD_S` seconds."""

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        try:
            async with asyncio.timeout(DOWNLOAD_S):
                return await super().prepare(with_usable_range(request))
        except TimeoutError:
            log.warning(
                "%s did not take %s within %g s", peer_address(request), request.path, DOWNLOAD_S
            )
            if request.transport:
                request.transport.abort()
            raise ConnectionResetError from None


def with_usable_range(request: web.BaseRequest) -> web.BaseRequest:
    """Return a request without a Range that is no single range of bytes, as RFC 9110, 14.2, says.

    The last 0 bytes become a range that no file satisfies; aiohttp would send the whole file.
    """
    if "Range" not in request.headers:
        return request
    headers = request.headers.copy()
    match = RANGE.fullmatch(headers.popall("Range")[0])
    if match and match["suffix"] and not int(match["suffix"]):
        headers["Range"] = f"bytes={MAX_FILE_BYTES}-"
    elif match and int(match["first"] or 0) <= int(match["last"] or MAX_FILE_BYTES):
        return request
    return request.clone(headers=headers)


@web.middleware
async def errors_to_responses(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn each failure into a response with a `ServiceProblem`."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        return http_error_response(error)
    except FleetError as error:
        _log_error(request, error)
        return error_response(error)
    except Exception:  # a failed request must not end the service
        log.exception("%s %s failed", request.method, request.path)
        return error_response(FleetError("internal"))


def _log_error(request: web.Request, error: FleetError) -> None:
    if status_of(error) >= 500:
        log.warning("%s %s failed: %s", request.method, request.path, error)
    else:
        client = peer_address(request)
        log.info("%s %s of %s is refused: %s", request.method, request.path, client, error)


async def read_body(request: web.Request, kind: type[T], timeout_s: float) -> T:
    """Read and decode a body.

    Raises:
        OversizedError, DecodeError: the body is too large or malformed.
        HTTPRequestTimeout: the body did not arrive in time.
    """
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise OversizedError(
            f"expected a body of at most {MAX_BODY_BYTES} bytes, got {request.content_length}"
        )
    try:
        async with asyncio.timeout(timeout_s):
            data = await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout from None
    except web.RequestPayloadError:
        raise DecodeError("expected a whole body, got chunks that are malformed") from None
    return decode_body(data, kind)


async def in_thread(work: Callable[..., T], *arguments: object) -> T:
    """Call `work` in a thread. Raises RegistryError after `ANSWER_S` seconds."""
    try:
        async with asyncio.timeout(ANSWER_S):
            return await asyncio.to_thread(work, *arguments)
    except TimeoutError:
        raise RegistryError(
            f"expected a response of the registry within {ANSWER_S:g} s, got none"
        ) from None


def client_fingerprint(request: web.Request) -> str | None:
    """Return the SHA-256 of the client's certificate, verified by TLS; None without one."""
    tls: ssl.SSLObject | None = request.get_extra_info("ssl_object")
    certificate = tls.getpeercert(binary_form=True) if tls else None
    return hashlib.sha256(certificate).hexdigest() if certificate else None


def peer_address(request: web.BaseRequest) -> str:
    """Return the address of the client."""
    return request.remote or "0.0.0.0"


def too_many_requests(wait_s: float) -> web.Response:
    """Return status 429 with the time to wait."""
    message = f"too many requests from this address; ask again in {math.ceil(wait_s)} s"
    return error_response(BusyError(message), wait_s)
