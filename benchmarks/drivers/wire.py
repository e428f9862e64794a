"""What the baselines say to each other, over the fleet's topics: msgpack, one message an MQTT payload."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from fleet.errors import DecodeError

MAX_CHUNK_BYTES: Final = 512 * 1024  # half of what our brokers take

Dtype = Literal["float16", "float32"]
Rows = npt.NDArray[Any]


class Prompt(Struct, frozen=True, tag="prompt"):
    """Device to cloud: the whole model's greedy answer, please."""

    token_ids: tuple[int, ...]
    max_new_tokens: int


class Hidden(Struct, frozen=True, tag="hidden", kw_only=True):
    """Device to cloud: hidden states of the positions from `start` on; behind the `is_last` piece, a token, please.

    `capacity` is how many positions the whole answer may take.
    """

    start: int
    capacity: int
    dtype: Dtype
    data: bytes
    is_last: bool

    def rows(self, hidden_size: int) -> Rows:
        """[n, hidden_size] of `dtype`, read-only."""
        return np.frombuffer(self.data, self.dtype).reshape(-1, hidden_size)


class Said(Struct, frozen=True, tag="said"):
    """Cloud to device: one token."""

    token_id: int


class Failed(Struct, frozen=True, tag="failed"):
    """Cloud to device: nothing will come."""

    message: str


ToCloud = Prompt | Hidden
ToClient = Said | Failed

_to_cloud = msgspec.msgpack.Decoder(ToCloud)
_to_client = msgspec.msgpack.Decoder(ToClient)


def encode(message: ToCloud | ToClient) -> bytes:
    return msgspec.msgpack.encode(message)


def decode_to_cloud(payload: bytes) -> ToCloud:
    """Raises DecodeError."""
    try:
        message: ToCloud = _to_cloud.decode(payload)
    except msgspec.MsgspecError as error:
        raise DecodeError(f"expected a prompt or hidden states: {error}") from None
    return message


def decode_to_client(payload: bytes) -> ToClient:
    """Raises DecodeError."""
    try:
        message: ToClient = _to_client.decode(payload)
    except msgspec.MsgspecError as error:
        raise DecodeError(f"expected a token: {error}") from None
    return message


def pieces(rows: Rows, start: int, capacity: int, dtype: Dtype) -> list[Hidden]:
    """Hidden states [n, hidden], those of the positions from `start` on, as messages that every broker takes."""
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
