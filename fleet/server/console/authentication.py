"""The authentication of the console's requests: a browser's session, or an operator's key."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, TypeAlias, TypeVar
from urllib.parse import urlsplit

from aiohttp import web

from fleet.errors import AccessError, BusyError, CredentialsError
from fleet.operator_api.operation import PREFIX, OperatorRole, SignedInOperator
from fleet.registry.operators.operator_secret import OperatorSecretKind
from fleet.registry.operators.repository import OperatorRepository
from fleet.server.console import static_files
from fleet.server.console.api_routes import OPERATOR, SIGN_IN_CHECK
from fleet.server.console.blocking_calls import BlockingCalls
from provisioning.rate_limit import RateLimit, peer_key

Checked = TypeVar("Checked")
Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]

SIGN_IN_PATH: Final = "/sign-in"
SIGN_OUT_PATH: Final = "/sign-out"
HEALTH_PATH: Final = "/healthz"
PUBLIC: Final = frozenset({SIGN_IN_PATH, HEALTH_PATH})
SAFE_METHODS: Final = frozenset({"GET", "HEAD"})
BEARER: Final = re.compile(r"bearer[ \t]+(.*?)[ \t]*", re.IGNORECASE)  # RFC 9110, 11.1
FAILURES_PER_MINUTE: Final = 10.0
MAX_FAILURES: Final = 20
NO_SESSION: Final = "sign in: open a link of 'fleet console', or of an admin of this fleet"


class Authentication:
    """Puts the operator of each request into ``request[OPERATOR]``.

    A session's cookie is sent by any page that the browser shows, so a change that comes with it
    has to come from the console itself. A key is sent by its owner's programs alone.
    """

    def __init__(
        self, operators: OperatorRepository, calls: BlockingCalls, *, port: int, has_tls: bool
    ) -> None:
        # Browsers send cookies to every port of a host, where other consoles may be.
        self.cookie = f"{'__Host-' if has_tls else ''}fleet_session_{port}"
        self.has_tls = has_tls
        self._operators = operators
        self._calls = calls
        self._failures = RateLimit(FAILURES_PER_MINUTE, MAX_FAILURES)

    @web.middleware
    async def authenticate(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Authenticate a request, unless its path is public.

        Raises:
            CredentialsError: there is no session and no key, or it has ended.
            AccessError: a page of another site sends the request.
            BusyError: the secret is wrong, and this address has sent too many wrong ones.
        """
        key = _key_of(request)
        if request.method not in SAFE_METHODS and key is None:
            check_same_site(request)
        if request.path not in PUBLIC and not request.path.startswith(static_files.PREFIX + "/"):
            request[OPERATOR] = await self._operator_of(request, key)
            request[SIGN_IN_CHECK] = partial(self._operator_of, request, key)
        return await handler(request)

    async def _operator_of(self, request: web.Request, key: str | None) -> SignedInOperator:
        if key is not None:
            return await self.check(request, OperatorSecretKind.KEY, key)
        session = request.cookies.get(self.cookie)
        if session is None:
            raise CredentialsError(NO_SESSION)
        return await self.check(request, OperatorSecretKind.SESSION, session)

    async def check(
        self, request: web.Request, kind: OperatorSecretKind, text: str
    ) -> SignedInOperator:
        """Return the operator of a secret. Raises CredentialsError or BusyError."""
        known = await self.guarded(request, partial(self._operators.authenticate, kind, text))
        return SignedInOperator(known.name, OperatorRole(known.role))

    async def guarded(self, request: web.Request, check: Callable[[], Checked]) -> Checked:
        """Return what `check` returns.

        Right secrets always count: the others behind a proxy have the same address.

        Raises:
            CredentialsError: the secret is wrong.
            BusyError: it is, and this address has sent too many wrong ones.
        """
        try:
            return await self._calls.run(check)
        except CredentialsError:
            peer = peer_key(request.remote or "0.0.0.0")
            if wait_s := self._failures.wait_s(peer):
                raise BusyError(
                    "too many wrong links, sessions or keys from this address; try in "
                    f"{wait_s:.0f} s"
                ) from None
            raise


def _key_of(request: web.Request) -> str | None:
    """Return the key that a program sends; no browser sends one by itself."""
    match = BEARER.fullmatch(request.headers.get("Authorization", ""))
    return match[1] if match and request.path.startswith(PREFIX + "/") else None


def check_same_site(request: web.Request) -> None:
    """Check that a page of the console itself sends a request.

    Raises:
        AccessError: another page sends it, or the browser does not tell.
    """
    site = request.headers.get("Sec-Fetch-Site")
    origin = request.headers.get("Origin")
    if site is None and origin is not None and _host_of(origin) == request.host:
        return
    if site != "same-origin":
        raise AccessError(
            "this change does not come from a page of this console; open the console and repeat it"
        )


def _host_of(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""
