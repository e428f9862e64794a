"""The devices that workers refuse: a JSON list of names, retained on `topics.REVOKED`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from fleet.errors import DecodeError, OversizedError
from fleet.protocol.types import Id
from fleet.utils.validation import JSON_ERRORS

MAX_DENIED: Final = 10_000
MAX_DENYLIST_BYTES: Final = MAX_DENIED * 66 + 2  # 63 characters, two quotes and a comma each

_DECODER = msgspec.json.Decoder(Annotated[list[Id], Meta(max_length=MAX_DENIED)])


def encode_denylist(names: Iterable[str]) -> bytes:
    """Encode the first `MAX_DENIED` names as a payload."""
    return msgspec.json.encode(list(names)[:MAX_DENIED])


def decode_denylist(payload: bytes) -> frozenset[str]:
    """Decode a payload into names.

    Raises:
        OversizedError: the payload is longer than `MAX_DENYLIST_BYTES`.
        DecodeError: it is no JSON list of at most `MAX_DENIED` names.
    """
    if len(payload) > MAX_DENYLIST_BYTES:
        raise OversizedError(
            f"expected at most {MAX_DENYLIST_BYTES} bytes of denied names, got {len(payload)}"
        )
    try:
        return frozenset(_DECODER.decode(payload))
    except JSON_ERRORS as error:
        raise DecodeError(f"expected a JSON list of names, got something else: {error}") from None
