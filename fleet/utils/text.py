"""Text from outside, as programs write it: UTF-8, perhaps with invisible bytes and characters."""

from __future__ import annotations

import re
import unicodedata
from typing import Final

BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
# The first bytes of text: a byte order mark, or an ASCII character (RFC 4627, section 3).
WIDE_ENCODINGS: Final = (
    ("UTF-32", re.compile(rb"\xff\xfe\0\0|\0\0\xfe\xff|[^\0]\0\0\0|\0\0\0[^\0]")),
    ("UTF-16", re.compile(rb"\xff\xfe|\xfe\xff|[^\0]\0|\0[^\0]")),
)
INVISIBLE: Final = frozenset({"Cc", "Cf", "Cn", "Zl", "Zp", "Zs"})  # general categories of Unicode
FILLERS: Final = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef]"
)
"""Unicode's default ignorable code points (UAX 44) of other categories, and the braille blank."""


def wide_encoding(data: bytes) -> str | None:
    """Return "UTF-16" or "UTF-32" if `data` begins as text in it, else None."""
    return next((name for name, beginning in WIDE_ENCODINGS if beginning.match(data)), None)


def text_of_payload(payload: bytes) -> str:
    """Return a payload as text, without a byte order mark before it and NULs at its end.

    Raises:
        UnicodeDecodeError: the payload is not UTF-8; a NUL inside shows that it is UTF-16.
    """
    data = payload.removeprefix(BYTE_ORDER_MARK).rstrip(b"\0")
    nul = data.find(b"\0")
    if nul >= 0:
        encoding = wide_encoding(data) or "UTF-16"
        raise UnicodeDecodeError("utf-8", data, nul, nul + 1, f"a NUL, as in {encoding}")
    return data.decode()


def is_blank(text: str) -> bool:
    """Return whether a text has no visible character."""
    return all(unicodedata.category(each) in INVISIBLE for each in FILLERS.sub("", text))
