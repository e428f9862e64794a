"""Which devices workers refuse: a list of names in JSON, retained on `fleet.protocol.topics.REVOKED`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from fleet.errors import DecodeError, OversizedError
from fleet.protocol.messages import Id

MAX_DENIED: Final = 10_000
MAX_DENYLIST_BYTES: Final = MAX_DENIED * 66 + 2  # 63 characters, two quotes and a comma each

_DECODER = msgspec.json.Decoder(Annotated[list[Id], Meta(max_length=MAX_DENIED)])


def encode_denylist(names: Iterable[str]) -> bytes:
    """The first `MAX_DENIED` names as a payload."""
    return msgspec.json.encode(list(names)[:MAX_DENIED])


def decode_denylist(payload: bytes) -> frozenset[str]:
    """Raises OversizedError or DecodeError."""
    if len(payload) > MAX_DENYLIST_BYTES:
        raise OversizedError(
            f"expected at most {MAX_DENYLIST_BYTES} bytes of denied names, got {len(payload)}"
        )
    try:
        return frozenset(_DECODER.decode(payload))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(f"expected a JSON list of names, got something else: {error}") from None
