"""The service's HTTP: paths, limits and deadlines around an `EnrolmentService`."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import ssl
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import msgspec
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from fleet.errors import BusyError, FleetError, OversizedError, RegistryError
from fleet.protocol.enrolment_api import (
    BUNDLES_PATH,
    CA_PATH,
    CRL_PATH,
    JOIN_PATH,
    MAX_BODY_BYTES,
    RENEW_PATH,
    JoinRequest,
    RenewRequest,
    decode_body,
)
from provisioning.enrolment_service import EnrolmentService
from provisioning.http_errors import http_problem, problem, status_of
from provisioning.rate_limit import RateLimit, peer_of

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
T = TypeVar("T")

ANSWER_S: Final = 60.0
DOWNLOAD_S: Final = 3600.0  # then a device goes on from where it is
PEM: Final = "application/x-pem-file"

log = logging.getLogger(__name__)


class Routes:
    """Handlers of one application; everything that blocks runs in a thread."""

    def __init__(
        self, office: EnrolmentService, joins: RateLimit, renewals: RateLimit, body_s: float
    ) -> None:
        """`body_s` is how long a body may take to arrive."""
        self._office = office
        self._body_s = body_s
        self._joins = joins
        self._renewals = renewals

    def application(self) -> web.Application:
        """What aiohttp serves."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[answer_problems])
        app.router.add_get(CA_PATH, self._ca)
        app.router.add_get(CRL_PATH, self._crl)
        app.router.add_post(JOIN_PATH, self._join)
        app.router.add_post(RENEW_PATH, self._renew)
        app.router.add_get(BUNDLES_PATH + "/{bundle_id}/{name:.+}", self._bundle_file)
        return app

    async def _ca(self, _: web.Request) -> web.Response:
        return web.Response(text=self._office.authority.pem, content_type=PEM)

    async def _crl(self, _: web.Request) -> web.Response:
        crl = await in_thread(self._office.crl)
        if crl is None:
            raise web.HTTPNotFound
        return web.Response(text=crl, content_type=PEM)

    async def _join(self, request: web.Request) -> web.Response:
        peer = peer_address(request)
        return await self._answer(
            request, self._joins, JoinRequest, lambda body: self._office.join(body, peer)
        )

    async def _renew(self, request: web.Request) -> web.Response:
        shown = client_fingerprint(request)
        return await self._answer(
            request, self._renewals, RenewRequest, lambda body: self._office.renew(body, shown)
        )

    async def _answer(
        self,
        request: web.Request,
        limit: RateLimit,
        kind: type[T],
        work: Callable[[T], msgspec.Struct],
    ) -> web.Response:
        """What succeeds does not count: a hundred devices behind one address may join, and nobody may guess."""
        peer = peer_of(peer_address(request))
        if wait_s := limit.wait_s(peer):
            return too_many(wait_s)
        reply = await in_thread(work, await read_body(request, kind, self._body_s))
        limit.give_back(peer)
        return web.Response(body=msgspec.json.encode(reply), content_type="application/json")

    async def _bundle_file(self, request: web.Request) -> web.StreamResponse:
        bundle_id = request.match_info["bundle_id"]
        name = request.match_info["name"]
        path = await in_thread(
            self._office.bundle_file, bundle_id, name, client_fingerprint(request)
        )
        return TimedFile(path)


class TimedFile(web.FileResponse):
    """A file, or the range of it that was asked for, for who takes it within `DOWNLOAD_S` seconds."""

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        try:
            async with asyncio.timeout(DOWNLOAD_S):
                return await super().prepare(request)
        except TimeoutError:
            log.warning(
                "%s did not take %s within %g s", peer_address(request), request.path, DOWNLOAD_S
            )
            if request.transport:
                request.transport.abort()
            raise ConnectionResetError from None


@web.middleware
async def answer_problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every failure is a `ServiceProblem`."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        return http_problem(error)
    except FleetError as error:
        if status_of(error) >= 500:
            log.warning("%s %s failed: %s", request.method, request.path, error)
        else:
            log.info(
                "%s %s of %s is refused: %s",
                request.method,
                request.path,
                peer_address(request),
                error,
            )
        return problem(error)
    except Exception:  # the outermost boundary of a request
        log.exception("%s %s failed", request.method, request.path)
        return problem(FleetError("internal"))


async def read_body(request: web.Request, kind: type[T], timeout_s: float) -> T:
    """Raises OversizedError, DecodeError, or HTTPRequestTimeout when the body does not come in time."""
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise OversizedError(
            f"expected a body of at most {MAX_BODY_BYTES} bytes, got {request.content_length}"
        )
    try:
        async with asyncio.timeout(timeout_s):
            data = await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout from None
    return decode_body(data, kind)


async def in_thread(work: Callable[..., T], *arguments: object) -> T:
    """What `work` gives; raises RegistryError when that takes longer than `ANSWER_S` seconds."""
    try:
        async with asyncio.timeout(ANSWER_S):
            return await asyncio.to_thread(work, *arguments)
    except TimeoutError:
        raise RegistryError(
            f"expected an answer of the registry within {ANSWER_S:g} s, got none"
        ) from None


def client_fingerprint(request: web.Request) -> str | None:
    """SHA-256 of the client's certificate, which TLS has verified; None when it showed none."""
    tls: ssl.SSLObject | None = request.get_extra_info("ssl_object")
    certificate = tls.getpeercert(binary_form=True) if tls else None
    return hashlib.sha256(certificate).hexdigest() if certificate else None


def peer_address(request: web.BaseRequest) -> str:
    """The address that the connection came from."""
    return request.remote or "0.0.0.0"


def too_many(wait_s: float) -> web.Response:
    """429, with the time to wait."""
    return problem(
        BusyError(f"too many requests from this address; ask again in {math.ceil(wait_s)} s"),
        wait_s,
    )
