"""Headers that protect the console's pages in browsers (OWASP Secure Headers Project)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

CONTENT_SECURITY_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
    )
)
HEADERS: Final = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "X-Permitted-Cross-Domain-Policies": "none",
}
ONE_YEAR_OF_TLS: Final = "max-age=31536000"


def header_setter(*, has_tls: bool) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """Return a function for aiohttp's signal `on_response_prepare`, which sets the headers."""

    async def set_headers(_: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(HEADERS)
        if has_tls:
            response.headers["Strict-Transport-Security"] = ONE_YEAR_OF_TLS
        response.headers.setdefault("Cache-Control", "no-store")
        response.headers["Server"] = "fleet"

    return set_headers
