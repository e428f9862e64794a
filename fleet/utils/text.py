"""Text of apps and sensors, as their programs write it: UTF-8, perhaps with invisible bytes."""

from __future__ import annotations

import unicodedata
from typing import Final

BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
INVISIBLE: Final = frozenset({"Cc", "Cf", "Cn", "Zl", "Zp", "Zs"})  # general categories of Unicode


def text_of_payload(payload: bytes) -> str:
    """Return a payload as text, without a byte order mark before it and NULs at its end.

    Raises:
        UnicodeDecodeError: the payload is not UTF-8; a NUL inside shows that it is UTF-16.
    """
    data = payload.removeprefix(BYTE_ORDER_MARK).rstrip(b"\0")
    nul = data.find(b"\0")
    if nul >= 0:
        raise UnicodeDecodeError("utf-8", data, nul, nul + 1, "a NUL, as in UTF-16")
    return data.decode()


def is_blank(text: str) -> bool:
    """Return whether a text has no visible character."""
    return all(unicodedata.category(character) in INVISIBLE for character in text)
