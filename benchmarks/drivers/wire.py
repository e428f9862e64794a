"""The baselines' messages over the fleet's topics: msgpack, one message an MQTT payload."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from fleet.errors import DecodeError

MAX_CHUNK_BYTES: Final = 512 * 1024  # half of what our brokers accept

Dtype = Literal["float16", "float32"]
Rows = npt.NDArray[Any]


class Prompt(Struct, frozen=True, tag="prompt"):
    """A request of a device for the whole model's greedy answer."""

    token_ids: tuple[int, ...]
    max_new_tokens: int


class Hidden(Struct, frozen=True, tag="hidden", kw_only=True):
    """A device's hidden states of the positions from `start` on.

    The `is_last` piece requests a token. `capacity` is the maximum number of positions of the
    answer.
    """

    start: int
    capacity: int
    dtype: Dtype
    data: bytes
    is_last: bool

    def rows(self, hidden_size: int) -> Rows:
        """Return [n, hidden_size] of `dtype`, read-only."""
        return np.frombuffer(self.data, self.dtype).reshape(-1, hidden_size)


class NextToken(Struct, frozen=True, tag="said"):
    """One token of the cloud."""

    token_id: int


class Failure(Struct, frozen=True, tag="failed"):
    """A failure of the cloud; no token follows."""

    message: str


ToCloud = Prompt | Hidden
ToClient = NextToken | Failure

_to_cloud = msgspec.msgpack.Decoder(ToCloud)
_to_client = msgspec.msgpack.Decoder(ToClient)


def encode(message: ToCloud | ToClient) -> bytes:
    return msgspec.msgpack.encode(message)


def decode_to_cloud(payload: bytes) -> ToCloud:
    """Decode a message to the cloud; raise DecodeError if it is not one."""
    try:
        message: ToCloud = _to_cloud.decode(payload)
    except msgspec.MsgspecError as error:
        raise DecodeError(f"expected a prompt or hidden states: {error}") from None
    return message


def decode_to_client(payload: bytes) -> ToClient:
    """Decode a message to the device; raise DecodeError if it is not one."""
    try:
        message: ToClient = _to_client.decode(payload)
    except msgspec.MsgspecError as error:
        raise DecodeError(f"expected a token: {error}") from None
    return message


def pieces(rows: Rows, start: int, capacity: int, dtype: Dtype) -> list[Hidden]:
    """Return hidden states [n, hidden] as messages that every broker accepts.

    They are those of the positions from `start` on.
    """
    rows = rows.astype(dtype)
    step = max(1, MAX_CHUNK_BYTES // rows[0].nbytes)
    return [
        Hidden(
            start=start + i,
            capacity=capacity,
            dtype=dtype,
            data=rows[i : i + step].tobytes(),
            is_last=i + step >= len(rows),
        )
        for i in range(0, len(rows), step)
    ]
