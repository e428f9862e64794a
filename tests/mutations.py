"""Damaged payloads, by seed: the results of a broken link, disk or program, or an attacker."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

LENGTHS: Final = (
    b"\x80", b"\x8f", b"\x90", b"\x9f", b"\xa0", b"\xbf", b"\xc1", b"\xc4\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xc7\x00\xff", b"\xc9\xff\xff\xff\xff\x01", b"\xca", b"\xcb\x7f\xf8\0\0\0\0\0\0",
    b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff", b"\xd3\x80\0\0\0\0\0\0\0", b"\xd6\xff\0\0\0\0",
    b"\xd9\xff",
    b"\xdb\xff\xff\xff\xff", b"\xdc\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xde\xff\xff",
    b"\xdf\xff\xff\xff\xff",
)  # fmt: skip
"""Heads of msgpack values, most of them of far more than follows."""

WORDS: Final = (
    b"null", b"true", b"-1", b"1e999", b"NaN", b"-0.0", b"9" * 400, b'"\\ud800"', b'""', b"{}",
    b"[]", b"\\u0000", b"\xed\xa0\x80", b"\xf5", b"\0",
)  # fmt: skip
"""Words that JSON may have in place of a value, or may not."""

OPENERS: Final = (b"[", b'{"a":', b"\x91", b"\x81\xa1a", b"(")
MAX_DEPTH: Final = 4000


class Mutator:
    """Damage each of `payloads`, some more than once. The same seed does the same damage."""

    def __init__(self, seed: int, payloads: Sequence[bytes]) -> None:
        self._random = random.Random(seed)
        self._payloads = payloads
        once = (self._set, self._cut_off, self._cut_out, self._repeat, self._splice)
        self._ways = (self._flip, self._flip, *once, self._lengthen, self._word, self._nest)

    def __call__(self, payload: bytes) -> bytes:
        for _ in range(self._random.choice((1, 1, 1, 2, 4))):
            payload = self._random.choice(self._ways)(payload)
        return payload

    def _place(self, payload: bytes) -> int:
        return self._random.randint(0, len(payload))

    def _flip(self, payload: bytes) -> bytes:
        if not payload:
            return payload
        damaged = bytearray(payload)
        damaged[self._random.randrange(len(payload))] ^= 1 << self._random.randrange(8)
        return bytes(damaged)

    def _set(self, payload: bytes) -> bytes:
        at = self._place(payload)
        return payload[:at] + self._random.randbytes(self._random.randint(1, 4)) + payload[at + 1 :]

    def _cut_off(self, payload: bytes) -> bytes:
        return payload[: self._place(payload)]

    def _cut_out(self, payload: bytes) -> bytes:
        start, stop = sorted((self._place(payload), self._place(payload)))
        return payload[:start] + payload[stop:]

    def _repeat(self, payload: bytes) -> bytes:
        start, stop = sorted((self._place(payload), self._place(payload)))
        return payload[:stop] + payload[start:]

    def _splice(self, payload: bytes) -> bytes:
        other = self._random.choice(self._payloads)
        return payload[: self._place(payload)] + other[self._place(other) :]

    def _lengthen(self, payload: bytes) -> bytes:
        at = self._place(payload)
        return payload[:at] + self._random.choice(LENGTHS) + payload[at + 1 :]

    def _word(self, payload: bytes) -> bytes:
        start = self._place(payload)
        stop = start + self._random.randint(0, 8)
        return payload[:start] + self._random.choice(WORDS) + payload[stop:]

    def _nest(self, payload: bytes) -> bytes:
        at = self._place(payload)
        return (
            payload[:at]
            + self._random.choice(OPENERS) * self._random.randint(1, MAX_DEPTH)
            + payload[at:]
        )
