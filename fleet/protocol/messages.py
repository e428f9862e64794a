"""The messages of a session between a device and a worker: frozen, validated, no I/O.

Field names, types and limits are the wire's; docs/protocol.md gives them with examples.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

from msgspec import Meta, Struct

PROTOCOL: Final = 3
MAX_POSITIONS: Final = 1 << 20
MAX_CHUNK_BYTES: Final = 256 * 1024
MAX_DRAFT: Final = 64

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


class Open(Struct, frozen=True, tag_field="type", tag="open", kw_only=True):
    """Device to workers: take this session. `max_positions` bounds the KV cache that it will need.

    `branch` is how many rejected drafts the device knows of: a worker that has the session on another branch starts
    it afresh.
    """

    session: Id
    epoch: Annotated[int, Meta(ge=0)]
    bundle_id: Id
    protocol: int
    sampling: Sampling
    max_positions: Annotated[int, Meta(ge=1, le=MAX_POSITIONS)]
    deadline_ms: DeadlineMs
    branch: Count = 0


class Opened(Struct, frozen=True, tag_field="type", tag="opened", kw_only=True):
    """Worker to device: it is mine; `received` positions are already here.

    It takes context in any of `dtypes`, and at most `window_bytes` of it beyond what it has acknowledged.
    """

    session: Id
    worker: Id
    received: Count
    max_chunk_bytes: Annotated[int, Meta(ge=1024, le=MAX_CHUNK_BYTES)]
    window_bytes: Annotated[int, Meta(ge=1024)]
    dtypes: Annotated[
        tuple[Annotated[str, Meta(max_length=32)], ...], Meta(min_length=1, max_length=16)
    ]


class ContextChunk(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Hidden states of positions [start, start + count), row-major, little-endian."""

    branch: Count
    start: Position
    count: Annotated[int, Meta(ge=1, le=MAX_POSITIONS)]
    data: Annotated[bytes, Meta(max_length=MAX_CHUNK_BYTES)]
    crc32: Annotated[int, Meta(ge=0, lt=1 << 32)]
    dtype: str = "float16"


class Context(Struct, frozen=True, tag_field="type", tag="context"):
    """Device to worker: the next hidden states, before anybody asks."""

    session: Id
    chunk: ContextChunk


class Assist(Struct, frozen=True, omit_defaults=True, tag_field="type", tag="assist", kw_only=True):
    """Device to worker: which token follows `position`? A `chunk` counts as if it had come just before."""

    session: Id
    request: Annotated[int, Meta(ge=0)]
    position: Position
    deadline_ms: DeadlineMs
    chunk: ContextChunk | None = None


class Verify(Struct, frozen=True, omit_defaults=True, tag_field="type", tag="verify", kw_only=True):
    """Device to worker: is `draft[i]` the token that follows position `start + i`, for every i?

    Those of the indices `trusted` need no judge: they are accepted as they are. A `chunk` counts as if it had come just
    before.
    """

    session: Id
    request: Annotated[int, Meta(ge=0)]
    branch: Count
    start: Position
    draft: Annotated[tuple[TokenId, ...], Meta(min_length=1, max_length=MAX_DRAFT)]
    deadline_ms: DeadlineMs
    chunk: ContextChunk | None = None
    trusted: Annotated[
        tuple[Annotated[int, Meta(ge=0, lt=MAX_DRAFT)], ...], Meta(max_length=MAX_DRAFT)
    ] = ()


class Token(Struct, frozen=True, tag_field="type", tag="token", kw_only=True):
    """Worker to device: the token that follows `position`, and its log-probability at temperature 1.

    `busy_ms` is how long the question was with the worker.
    """

    session: Id
    request: Annotated[int, Meta(ge=0)]
    position: Position
    token_id: TokenId
    logprob: float
    busy_ms: Annotated[float, Meta(ge=0, le=1e9)] = 0.0


class Verified(Struct, frozen=True, tag_field="type", tag="verified", kw_only=True):
    """Worker to device: the first `accepted` tokens of the draft are mine, too.

    `token_id` is the worker's own in the place of the first one that is not, None when all are accepted. A rejection
    begins the next branch: both sides forget what lies behind position `start + accepted`. `logprobs` are those of the
    accepted tokens and of `token_id`, at temperature 1; 0 of one that was trusted.
    """

    session: Id
    request: Annotated[int, Meta(ge=0)]
    start: Position
    accepted: Annotated[int, Meta(ge=0, le=MAX_DRAFT)]
    token_id: TokenId | None
    logprobs: Annotated[tuple[float, ...], Meta(max_length=MAX_DRAFT)]
    busy_ms: Annotated[float, Meta(ge=0, le=1e9)] = 0.0


class Received(Struct, frozen=True, tag_field="type", tag="received"):
    """Worker to device: positions [0, count) of this branch have arrived; the window moves on."""

    session: Id
    branch: Count
    count: Count


class Gap(Struct, frozen=True, tag_field="type", tag="gap"):
    """Worker to device: positions from `expected` on of this branch are missing; send them again."""

    session: Id
    branch: Count
    expected: Count


class Refused(Struct, frozen=True, tag_field="type", tag="refused", kw_only=True):
    """Worker to device: not served by `worker`. `retry_after_ms` 0 means that asking again will not help."""

    session: Id
    code: Id
    retry_after_ms: Annotated[int, Meta(ge=0)]
    message: Text
    worker: Id | None = None


class Close(Struct, frozen=True, tag_field="type", tag="close"):
    """Device to worker: the session has ended; its cache can go."""

    session: Id


ToWorker: TypeAlias = Open | Context | Assist | Verify | Close
ToDevice: TypeAlias = Opened | Token | Verified | Received | Gap | Refused
Message: TypeAlias = ToWorker | ToDevice
