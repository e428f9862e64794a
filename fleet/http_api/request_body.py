"""Bodies of requests, read within a limit and a deadline."""

from __future__ import annotations

import asyncio
from typing import Final

from aiohttp import web

from fleet.errors import DecodeError, OversizedError

BODY_S: Final = 30.0


async def read_whole_body(request: web.Request, max_bytes: int, advice: str) -> bytes:
    """Read a body of at most `max_bytes`; `advice` is the next step for a larger one.

    Raises:
        OversizedError, DecodeError: the body is too large, malformed, or does not arrive in time.
    """
    too_large = OversizedError(f"expected a body of at most {max_bytes} bytes; {advice}")
    if (request.content_length or 0) > max_bytes:
        raise too_large
    try:
        async with asyncio.timeout(BODY_S):
            return await _read_up_to(request, max_bytes, too_large)
    except TimeoutError:
        raise DecodeError(f"expected a whole body within {BODY_S:g} s; send it again") from None
    except web.RequestPayloadError:
        raise DecodeError("expected a whole body, got chunks that are malformed") from None


async def _read_up_to(request: web.Request, max_bytes: int, error: OversizedError) -> bytes:
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > max_bytes:
            raise error
    return bytes(body)
