"""Messages to bytes and back: msgpack; sizes are checked before memory is allocated, types before
use.
"""

from __future__ import annotations

import zlib
from typing import Final, TypeAlias, TypeVar, get_args

import msgpack
import msgspec
import numpy as np
import numpy.typing as npt

from fleet.errors import DecodeError, OversizedError
from fleet.protocol.hidden_states import FLOAT16, TOKENS, Float16, pack_rows, unpack_rows
from fleet.protocol.messages import MAX_CHUNK_BYTES, ContextChunk, Message, ToDevice, ToWorker

MAX_ENVELOPE_BYTES: Final = MAX_CHUNK_BYTES + 4096

TOKEN_DTYPE: Final = np.dtype("<u4")
TOKEN_BYTES: Final = TOKEN_DTYPE.itemsize
TokenIds: TypeAlias = npt.NDArray[np.uint32]

T = TypeVar("T")


def encode(message: Message) -> bytes:
    """Return one message as a msgpack map with its ``type``."""
    packed: bytes = msgpack.packb(msgspec.to_builtins(message, builtin_types=(bytes,)))
    return packed


def decode(payload: bytes, expected: type[T]) -> T:
    """Return the message of `payload`; `expected` is a message type or a union of them.

    Unknown fields are ignored.

    Raises:
        OversizedError: the payload is larger than any message.
        DecodeError: the payload is no msgpack map, of an unknown type, or a field is missing or out
            of range.
    """
    if len(payload) > MAX_ENVELOPE_BYTES:
        raise OversizedError(
            f"expected a message of at most {MAX_ENVELOPE_BYTES} bytes, got {len(payload)}"
        )
    try:
        raw = msgpack.unpackb(
            payload,
            max_bin_len=MAX_CHUNK_BYTES,
            max_str_len=4096,
            max_array_len=4096,
            max_map_len=64,
            max_ext_len=0,
        )
        return msgspec.convert(raw, expected)
    except (ValueError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise DecodeError(
            f"expected one of these messages: {_names(expected)}; "
            f"got {len(payload)} unreadable bytes: {str(error) or type(error).__name__}"
        ) from None


def decode_to_worker(payload: bytes) -> ToWorker:
    """Return the message of a device to a worker; raise the errors of :func:`decode`."""
    message: ToWorker = decode(payload, ToWorker)  # type: ignore[arg-type]
    return message


def decode_to_device(payload: bytes) -> ToDevice:
    """Return the message of a worker to a device; raise the errors of :func:`decode`."""
    message: ToDevice = decode(payload, ToDevice)  # type: ignore[arg-type]
    return message


def _names(expected: object) -> str:
    members: tuple[type, ...] = get_args(expected) or (expected,)
    return ", ".join(member.__name__.lower() for member in members)


def pack_chunk(
    branch: int,
    start: int,
    hidden_states: Float16,
    dtype: str = FLOAT16,
    tokens: TokenIds | None = None,
) -> ContextChunk:
    """Pack hidden states [count, hidden] float16 of positions [start, start + count) for a message,
    with their tokens [count] if those are given.
    """
    data = pack_rows(hidden_states, dtype)
    ids = b"" if tokens is None else tokens.tobytes()
    return ContextChunk(
        branch=branch,
        start=start,
        count=len(hidden_states),
        data=data,
        crc32=zlib.crc32(ids, zlib.crc32(data)),
        dtype=dtype,
        tokens=ids,
    )


def pack_token_ids(branch: int, start: int, token_ids: TokenIds) -> ContextChunk:
    """Pack the token ids [count] of positions [start, start + count) in place of hidden states."""
    data = token_ids.tobytes()
    return ContextChunk(
        branch=branch,
        start=start,
        count=len(token_ids),
        data=data,
        crc32=zlib.crc32(data),
        dtype=TOKENS,
    )


def unpack_tokens(chunk: ContextChunk, vocab_size: int) -> list[int]:
    """Return the token ids [count] of a chunk, which has them next to or in place of hidden states.

    Raises:
        DecodeError: their number is not that of the positions, the vocabulary has no such id, or
            the checksum is wrong.
    """
    check_crc(chunk)
    data = chunk.data if chunk.dtype == TOKENS else chunk.tokens
    if len(data) != TOKEN_BYTES * chunk.count:
        raise DecodeError(
            f"context at position {chunk.start}: expected {chunk.count} token ids, "
            f"got {len(data)} bytes; send 4 for each position"
        )
    tokens = np.frombuffer(data, TOKEN_DTYPE)
    if tokens.max(initial=0) >= vocab_size:
        raise DecodeError(
            f"context at position {chunk.start}: expected token ids below {vocab_size}, "
            f"got {tokens.max(initial=0)}; use the tokenizer of the bundle"
        )
    ids: list[int] = tokens.tolist()
    return ids


def unpack_chunk(chunk: ContextChunk, hidden_size: int) -> Float16:
    """Return the hidden states [count, hidden_size] float16 of a chunk, read-only.

    Raises:
        DecodeError: the dtype, the number of bytes or the checksum is wrong, or values are not
            finite.
    """
    check_crc(chunk)
    return unpack_rows(chunk.data, chunk.count, hidden_size, chunk.dtype)


def check_crc(chunk: ContextChunk) -> None:
    """Raise DecodeError if the checksum of a chunk is wrong."""
    if zlib.crc32(chunk.tokens, zlib.crc32(chunk.data)) != chunk.crc32:
        raise DecodeError(
            f"context at position {chunk.start}: the checksum does not match the data; "
            "send it again"
        )
