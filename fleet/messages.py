"""The messages of a session between a device and a worker: frozen, validated, no I/O.

Field names, types and limits are the wire's; docs/protocol.md gives them with examples.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

from msgspec import Meta, Struct

PROTOCOL: Final = 1
MAX_POSITIONS: Final = 1 << 20
MAX_CHUNK_BYTES: Final = 256 * 1024

Id: TypeAlias = Annotated[str, Meta(pattern=r"\A[a-z0-9][a-z0-9_-]{0,62}\Z")]
Position: TypeAlias = Annotated[int, Meta(ge=0, lt=MAX_POSITIONS)]
Count: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_POSITIONS)]
TokenId: TypeAlias = Annotated[int, Meta(ge=0, lt=1 << 31)]
DeadlineMs: TypeAlias = Annotated[int, Meta(ge=1, le=600_000)]
Seed: TypeAlias = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Text: TypeAlias = Annotated[str, Meta(max_length=1000)]


class Sampling(Struct, frozen=True, forbid_unknown_fields=True):
    """How a token is drawn from a distribution; `temperature` 0 is greedy, `top_k` 0 is no limit of its own."""

    temperature: Annotated[float, Meta(ge=0, le=5)] = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=1000)] = 0
    seed: Seed = 0


class Open(Struct, frozen=True, tag_field="type", tag="open"):
    """Device to workers: take this session. `max_positions` bounds the KV cache that it will need."""

    session: Id
    epoch: Annotated[int, Meta(ge=0)]
    bundle_id: Id
    protocol: int
    sampling: Sampling
    max_positions: Annotated[int, Meta(ge=1, le=MAX_POSITIONS)]
    deadline_ms: DeadlineMs


class Opened(Struct, frozen=True, tag_field="type", tag="opened"):
    """Worker to device: it is mine; `received` positions are already here."""

    session: Id
    worker: Id
    received: Count
    max_chunk_bytes: Annotated[int, Meta(ge=1024, le=MAX_CHUNK_BYTES)]


class Context(Struct, frozen=True, tag_field="type", tag="context"):
    """Device to worker: hidden states of positions [start, start + count), row-major, little-endian."""

    session: Id
    start: Position
    count: Annotated[int, Meta(ge=1, le=MAX_POSITIONS)]
    dtype: str
    data: Annotated[bytes, Meta(max_length=MAX_CHUNK_BYTES)]
    crc32: Annotated[int, Meta(ge=0, lt=1 << 32)]


class Assist(Struct, frozen=True, tag_field="type", tag="assist"):
    """Device to worker: which token follows `position`?"""

    session: Id
    request: Annotated[int, Meta(ge=0)]
    position: Position
    deadline_ms: DeadlineMs


class Token(Struct, frozen=True, tag_field="type", tag="token"):
    """Worker to device: the token that follows `position`, and its log-probability at temperature 1."""

    session: Id
    request: Annotated[int, Meta(ge=0)]
    position: Position
    token_id: TokenId
    logprob: float


class Gap(Struct, frozen=True, tag_field="type", tag="gap"):
    """Worker to device: positions from `expected` on are missing; send them again."""

    session: Id
    expected: Count


class Refused(Struct, frozen=True, tag_field="type", tag="refused"):
    """Worker to device: not served. `retry_after_ms` 0 means that asking again will not help."""

    session: Id
    code: Id
    retry_after_ms: Annotated[int, Meta(ge=0)]
    message: Text


class Close(Struct, frozen=True, tag_field="type", tag="close"):
    """Device to worker: the session has ended; its cache can go."""

    session: Id


ToWorker: TypeAlias = Open | Context | Assist | Close
ToDevice: TypeAlias = Opened | Token | Gap | Refused
Message: TypeAlias = ToWorker | ToDevice
