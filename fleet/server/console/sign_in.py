"""Signing in with a link, and signing out."""

from __future__ import annotations

from functools import partial
from typing import Final

from aiohttp import web

from fleet.errors import BusyError, CredentialsError
from fleet.registry.operators.repository import SESSION_S, OperatorRepository
from fleet.server.console.authentication import SIGN_IN_PATH, SIGN_OUT_PATH, Authentication
from fleet.server.console.blocking_calls import BlockingCalls
from fleet.server.console.form_body import read_form
from fleet.server.console.rendering import render
from fleet.server.console.return_page import UNSAVED, ReturnPage

MAX_FORM_BYTES: Final = 4096
TITLE: Final = "Sign in"
NEW_LINK: Final = (
    "Run 'fleet console' on the machine with the fleet's folder, or ask an admin of this fleet for "
    "a link."
)

ENDED_BEFORE_CHANGE: Final = (
    "Your session has ended, and your last change was not made. Sign in on this browser: then the "
    "page with the form is shown again, so that you can repeat the change."
)


class SignIn:
    """The pages of signing in and out.

    A link shows a page with a button, because programs that show a preview of links open them, too.
    """

    def __init__(
        self,
        operators: OperatorRepository,
        calls: BlockingCalls,
        authentication: Authentication,
        pages: ReturnPage,
    ) -> None:
        self._operators = operators
        self._calls = calls
        self._authentication = authentication
        self._pages = pages

    def routes(self) -> list[web.RouteDef]:
        """Return the routes."""
        return [
            web.get(SIGN_IN_PATH, self._show),
            web.post(SIGN_IN_PATH, self._sign_in),
            web.post(SIGN_OUT_PATH, self._sign_out),
        ]

    async def _show(self, request: web.Request) -> web.Response:
        link = request.query.get("link")
        if link is None and UNSAVED in request.query:
            return _page(ENDED_BEFORE_CHANGE, NEW_LINK)
        if link is None:
            return _page("You are not signed in, or your session has ended.", NEW_LINK)
        return _page("This link signs you in on this browser, once.", "", link=link[:200])

    async def _sign_in(self, request: web.Request) -> web.Response:
        link = (await read_form(request, MAX_FORM_BYTES)).get("link", "")
        try:
            new = await self._authentication.guarded(
                request, partial(self._operators.sign_in, link)
            )
        except (CredentialsError, BusyError) as error:
            status = 429 if isinstance(error, BusyError) else 403
            return _page(f"{error}.".capitalize(), NEW_LINK, status=status)
        response = self._pages.back(request)
        response.set_cookie(
            self._authentication.cookie,
            str(new.secret),
            max_age=int(SESSION_S),
            path="/",
            httponly=True,
            samesite="Strict",
            secure=self._authentication.has_tls,
        )
        raise response

    async def _sign_out(self, request: web.Request) -> web.Response:
        session = request.cookies.get(self._authentication.cookie, "")
        await self._calls.run(partial(self._operators.sign_out, session))
        response = web.HTTPSeeOther(SIGN_IN_PATH)
        response.del_cookie(self._authentication.cookie, path="/")
        raise response


def _page(message: str, next_step: str, *, link: str = "", status: int = 200) -> web.Response:
    return render(
        "sign_in.html", status, title=TITLE, message=message, next_step=next_step, link=link
    )
