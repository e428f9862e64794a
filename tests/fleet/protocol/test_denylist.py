"""The list of devices that workers refuse, as bytes."""

import pytest

from fleet.errors import DecodeError, OversizedError
from fleet.protocol.denylist import MAX_DENIAL_BYTES, MAX_DENIED, decode_denial, encode_denial


@pytest.mark.parametrize("names", [[], ["d1"], ["d2", "d1"]])
def test_a_list_survives_the_way(names: list[str]) -> None:
    assert decode_denial(encode_denial(names)) == frozenset(names)


def test_the_longest_list_fits_and_no_longer_one_is_made() -> None:
    payload = encode_denial(f"{i:063}" for i in range(MAX_DENIED + 1))
    assert len(payload) <= MAX_DENIAL_BYTES < 1 << 20
    assert len(decode_denial(payload)) == MAX_DENIED


@pytest.mark.parametrize("payload", [b"", b"[", b"{}", b"[1]", b'["A"]', b'["../#"]', b"\xff", b"[" * 100_000])
def test_what_is_no_list_of_names_is_refused(payload: bytes) -> None:
    with pytest.raises(DecodeError):
        decode_denial(payload)


def test_too_many_bytes_are_refused_unread() -> None:
    with pytest.raises(OversizedError):
        decode_denial(b" " * (MAX_DENIAL_BYTES + 1))
