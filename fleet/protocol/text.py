"""Text of apps and sensors, as their programs write it: UTF-8, perhaps with invisible bytes."""

from __future__ import annotations

import unicodedata
from typing import Final

BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
INVISIBLE: Final = frozenset({"Cc", "Cf", "Cn", "Zl", "Zp", "Zs"})  # general categories of Unicode


def text_of_payload(payload: bytes) -> str:
    """Return a payload as text, without a byte order mark before it and NULs at its end.

    Raises:
        UnicodeDecodeError: the payload is not UTF-8.
    """
    return payload.removeprefix(BYTE_ORDER_MARK).rstrip(b"\0").decode()


def is_blank(text: str) -> bool:
    """Return whether a text has no visible character."""
    return all(unicodedata.category(character) in INVISIBLE for character in text)
