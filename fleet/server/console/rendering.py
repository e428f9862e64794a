"""Pages from templates: text from outside is escaped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from aiohttp import web
from jinja2 import Environment, PackageLoader, StrictUndefined

from fleet.server.console import drawings, formatting

ENVIRONMENT: Final = Environment(
    loader=PackageLoader("fleet.server.console"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.globals["static"] = lambda name: f"/static/{name}"
ENVIRONMENT.globals["source_class"] = formatting.source_class
ENVIRONMENT.globals["exits_in_order"] = formatting.exits_in_order
ENVIRONMENT.filters.update(
    age=formatting.age,
    bytes=formatting.num_bytes,
    detail=formatting.audit_detail,
    moment=formatting.moment,
    ms=formatting.milliseconds,
    number=formatting.number,
    percent=formatting.percent,
    short=formatting.shortened,
    source_bar=drawings.source_picture,
    sparkline=drawings.sparkline,
)


def set_static_url(static_url: Callable[[str], str]) -> None:
    """Set the function that returns the address of a static file by its name."""
    ENVIRONMENT.globals["static"] = static_url


def render(template: str, status: int = 200, **values: Any) -> web.Response:
    """Return a page."""
    text = ENVIRONMENT.get_template(template).render(**values)
    return web.Response(text=text, status=status, content_type="text/html")
