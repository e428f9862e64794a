"""The page to which a sign-in leads back, kept in a cookie of the browser."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from fleet.server.console.authentication import SAFE_METHODS, SIGN_IN_PATH, SIGN_OUT_PATH

RETURN_S: Final = 3600
MAX_LENGTH: Final = 500
HOME: Final = "/"
UNSAVED: Final = "unsaved"
"""The field of the sign-in's address after a change that was not made."""


class ReturnPage:
    """The cookie; `name` is that of the console's session, so that each console has its own."""

    def __init__(self, name: str, *, has_tls: bool) -> None:
        self._name = f"{name}_page"
        self._has_tls = has_tls

    async def leave(self, request: web.Request) -> web.HTTPSeeOther:
        """Return the way to the sign-in, which remembers the page of a request.

        After a form it tells that the change was not made.
        """
        is_change = request.method not in SAFE_METHODS and request.path != SIGN_OUT_PATH
        response = web.HTTPSeeOther(f"{SIGN_IN_PATH}?{UNSAVED}=1" if is_change else SIGN_IN_PATH)
        response.set_cookie(
            self._name,
            await _page_of(request),
            max_age=RETURN_S,
            path="/",
            httponly=True,
            samesite="Strict",
            secure=self._has_tls,
        )
        return response

    def back(self, request: web.Request) -> web.HTTPSeeOther:
        """Return the way to the page that the browser left, or to the overview."""
        page = request.cookies.get(self._name, HOME)
        response = web.HTTPSeeOther(page if is_own_path(page) else HOME)
        if self._name in request.cookies:
            response.del_cookie(self._name, path="/", secure=self._has_tls, samesite="Strict")
        return response


async def _page_of(request: web.Request) -> str:
    """Return the address of a page, or of the page that has a form."""
    if request.method in SAFE_METHODS:
        address = str(request.rel_url)
        return address if is_own_path(address) and await _is_page(request, request.path) else HOME
    path = request.path
    while path != HOME and not await _is_page(request, path):
        path = path.rpartition("/")[0] or HOME
    return path if is_own_path(path) else HOME


async def _is_page(request: web.Request, path: str) -> bool:
    found = await request.app.router.resolve(request.clone(method="GET", rel_url=path))
    return found.http_exception is None


def is_own_path(text: str) -> bool:
    """Whether a text is a path on this server alone; browsers read a backslash as a slash."""
    is_short = len(text) <= MAX_LENGTH and text.isascii() and text.isprintable()
    return is_short and text.startswith("/") and not text.startswith("//") and "\\" not in text
