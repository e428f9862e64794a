"""Protection of an API from web pages: a browser sends the requests of any page."""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import SplitResult, urlsplit

from fleet.errors import AccessError


def check_page(host: str, origin: str | None, hosts: Collection[str] | None) -> None:
    """Check the headers Host and Origin of a request.

    `hosts` are the names and addresses that Host may have; None allows any. A name of another site
    can lead to this machine (DNS rebinding).

    Raises:
        AccessError: a page of another site sends the request, or Host is another site's name.
    """
    if hosts is not None and _split(f"//{host}").hostname not in hosts:
        raise AccessError(
            f"expected a request to one of {', '.join(sorted(hosts))}, got one to {host[:200]!r}"
        )
    if origin is not None and _split(origin).netloc != host:
        raise AccessError(
            f"a page of {origin[:200]!r} may not use this API; a program may, without the header "
            "'Origin'"
        )


def _split(address: str) -> SplitResult:
    """Return the parts of an address; empty ones if it is none, such as ``http://[``."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")
