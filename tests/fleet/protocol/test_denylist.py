"""The list of devices that workers refuse, as bytes."""

import pytest

from fleet.errors import DecodeError, OversizedError
from fleet.protocol.denylist import MAX_DENIED, MAX_DENYLIST_BYTES, decode_denylist, encode_denylist


@pytest.mark.parametrize("names", [[], ["d1"], ["d2", "d1"]])
def test_a_list_survives_the_way(names: list[str]) -> None:
    assert decode_denylist(encode_denylist(names)) == frozenset(names)


def test_the_longest_list_fits_and_no_longer_one_is_made() -> None:
    payload = encode_denylist(f"{i:063}" for i in range(MAX_DENIED + 1))
    assert len(payload) <= MAX_DENYLIST_BYTES < 1 << 20
    assert len(decode_denylist(payload)) == MAX_DENIED


@pytest.mark.parametrize(
    "payload", [b"", b"[", b"{}", b"[1]", b'["A"]', b'["../#"]', b"\xff", b"[" * 100_000]
)
def test_a_payload_that_is_no_list_of_names_is_refused(payload: bytes) -> None:
    with pytest.raises(DecodeError):
        decode_denylist(payload)


def test_too_many_bytes_are_refused_unread() -> None:
    with pytest.raises(OversizedError):
        decode_denylist(b" " * (MAX_DENYLIST_BYTES + 1))
