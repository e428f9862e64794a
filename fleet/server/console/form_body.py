"""Forms that a page of the console sends."""

from __future__ import annotations

from typing import Final
from urllib.parse import parse_qsl

from aiohttp import web

from fleet.errors import DecodeError
from fleet.http_api.request_body import read_whole_body

FORM: Final = "application/x-www-form-urlencoded"
MAX_FORM_BYTES: Final = 65_536
MAX_FIELDS: Final = 100


async def read_form(request: web.Request, max_bytes: int = MAX_FORM_BYTES) -> dict[str, str]:
    """Return the fields of a form. Of equal names the last one counts.

    Raises:
        OversizedError: the form is too large.
        DecodeError: it is no form of a page, has too many fields, or does not arrive in time.
    """
    body = await read_whole_body(request, max_bytes, "enter less, or open the page again")
    if request.content_type != FORM:
        raise DecodeError(f"expected a form of a page ({FORM}); open the page again")
    text = body.decode("utf-8", "replace")
    try:
        return dict(parse_qsl(text, keep_blank_values=True, max_num_fields=MAX_FIELDS))
    except ValueError:
        raise DecodeError(f"expected at most {MAX_FIELDS} fields; open the page again") from None
