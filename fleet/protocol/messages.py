"""The messages of a session between a device and a worker: frozen, validated, no I/O.

Field names, types and limits are those of the wire; docs/protocol.md lists them.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

from msgspec import UNSET, Meta, Struct, UnsetType

from fleet.protocol.constraint import Constraint
from fleet.protocol.types import (
    MAX_POSITIONS,
    Count,
    DeadlineMs,
    Id,
    Layer,
    LogitBias,
    Penalty,
    Position,
    RepetitionPenalty,
    Seed,
    Share,
    Temperature,
    Text,
    TokenId,
    TopK,
    TopLogprobs,
    TopP,
)

PROTOCOL: Final = 5
MIN_PROTOCOL: Final = 4
"""The protocol of a session without rules, which workers of earlier versions serve, too."""
MAX_CHUNK_BYTES: Final = 256 * 1024
MAX_DRAFT: Final = 64


TopTokens: TypeAlias = Annotated[tuple[tuple[TokenId, float], ...], Meta(max_length=20)]
"""The best tokens of a position with their log-probabilities at temperature 1, best first."""


class Sampling(Struct, frozen=True, forbid_unknown_fields=True):
    """The way to draw a token from a distribution.

    `temperature` 0 is greedy; `top_k` 0 adds no limit.
    """

    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    seed: Seed = 0


class ChoiceRules(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The rules that change logits before a draw; `fleet.protocol.choice_rules` applies them.

    The penalties read the tokens so far, of which the first `prompt_length` are the prompt. The
    best `top_logprobs` tokens are returned with each choice. With a `constraint` only the tokens
    that it allows are chosen.
    """

    min_p: Share = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: LogitBias = ()
    prompt_length: Count = 0
    top_logprobs: TopLogprobs = 0
    constraint: Constraint | None = None

    @property
    def need_text(self) -> bool:
        """Whether a choice depends on the tokens before it."""
        penalties = self.presence_penalty or self.frequency_penalty
        return self.repetition_penalty != 1.0 or bool(penalties or self.constraint)

    @property
    def change_logits(self) -> bool:
        """Whether any logit may change."""
        return self.need_text or bool(self.logit_bias)


NO_RULES: Final = ChoiceRules()


class Continuation(Struct, frozen=True, kw_only=True):
    """An earlier session of the device whose first `num_positions` positions are those of the new
    session. `branch` is the one that it ended on.
    """

    session: Id
    branch: Count
    num_positions: Count


class Open(Struct, frozen=True, tag_field="type", tag="open", kw_only=True):
    """Device to workers: a request to accept this session.

    `max_positions` bounds the KV cache that it will need. `branch` is the number of rejected drafts
    that the device knows of: a worker that has the session on another branch starts it afresh. The
    hidden states are those after `upload_layer` layers, by default the lowest of the bundle's. An
    `Open` with `rules` is of protocol 5, so that no earlier worker ignores them. A worker that has
    the session that this one `continues` moves its positions into the new one; any other worker
    ignores the field.
    """

    session: Id
    epoch: Annotated[int, Meta(ge=0)]
    bundle_id: Id
    protocol: int
    sampling: Sampling
    max_positions: Annotated[int, Meta(ge=1, le=MAX_POSITIONS)]
    deadline_ms: DeadlineMs
    branch: Count = 0
    upload_layer: Layer | UnsetType = UNSET
    rules: ChoiceRules | UnsetType = UNSET
    continues: Continuation | UnsetType = UNSET

    @property
    def choice_rules(self) -> ChoiceRules:
        """The rules, or those that change nothing."""
        return NO_RULES if self.rules is UNSET else self.rules


class Opened(Struct, frozen=True, tag_field="type", tag="opened", kw_only=True):
    """Worker to device: the session is accepted; `received` positions have already arrived.

    The worker accepts context in any of `dtypes`, and at most `window_bytes` of it beyond the last
    receipt.
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
    """Hidden states of positions [start, start + count), row-major, little-endian.

    `tokens` are the ids of the tokens at these positions, uint32, if the session's rules need them.
    With the `dtype` ``tokens`` they are in `data`, and the worker computes the hidden states.
    """

    branch: Count
    start: Position
    count: Annotated[int, Meta(ge=1, le=MAX_POSITIONS)]
    data: Annotated[bytes, Meta(max_length=MAX_CHUNK_BYTES)]
    crc32: Annotated[int, Meta(ge=0, lt=1 << 32)]
    dtype: str = "float16"
    tokens: Annotated[bytes, Meta(max_length=MAX_CHUNK_BYTES)] = b""


class Context(Struct, frozen=True, tag_field="type", tag="context"):
    """Device to worker: the next hidden states, ahead of a verify request."""

    session: Id
    chunk: ContextChunk


class Verify(Struct, frozen=True, omit_defaults=True, tag_field="type", tag="verify", kw_only=True):
    """Device to worker: the request whether `draft[i]` is the token that follows position `start +
    i`, for every i.

    Tokens at the indices `trusted` are accepted without a verdict. A `chunk` counts as if it had
    arrived just before.
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


class Verified(Struct, frozen=True, tag_field="type", tag="verified", kw_only=True):
    """Worker to device: the first `accepted` tokens of the draft equal the worker's.

    `token_id` is the worker's own token in place of the first rejected one, None when all are
    accepted. A rejection begins the next branch: both sides drop every position after `start +
    accepted`. `logprobs` are those of the accepted tokens and of `token_id`, at temperature 1; 0
    for a trusted token. `busy_ms` is the time that the worker held the request. `top` has the best
    tokens and their log-probabilities for each of `logprobs`, if the rules ask for them.
    """

    session: Id
    request: Annotated[int, Meta(ge=0)]
    start: Position
    accepted: Annotated[int, Meta(ge=0, le=MAX_DRAFT)]
    token_id: TokenId | None
    logprobs: Annotated[tuple[float, ...], Meta(max_length=MAX_DRAFT)]
    busy_ms: Annotated[float, Meta(ge=0, le=1e9)] = 0.0
    top: Annotated[tuple[TopTokens, ...], Meta(max_length=MAX_DRAFT)] | UnsetType = UNSET


class Received(Struct, frozen=True, tag_field="type", tag="received"):
    """Worker to device: positions [0, count) of this branch have arrived; the window moves on."""

    session: Id
    branch: Count
    count: Count


class Gap(Struct, frozen=True, tag_field="type", tag="gap"):
    """Worker to device: positions from `expected` on of this branch are missing; send them
    again.
    """

    session: Id
    branch: Count
    expected: Count


class Refused(Struct, frozen=True, tag_field="type", tag="refused", kw_only=True):
    """Worker to device: `worker` does not serve this; `retry_after_ms` 0 means that another try
    will not help.
    """

    session: Id
    code: Id
    retry_after_ms: Annotated[int, Meta(ge=0)]
    message: Text
    worker: Id | None = None


class Close(Struct, frozen=True, omit_defaults=True, tag_field="type", tag="close"):
    """Device to worker: the session has ended, and its memory may be freed.

    With `keep` the worker keeps the positions, while no session in use needs the memory: a later
    session may continue this one. Earlier workers free them.
    """

    session: Id
    keep: bool = False


ToWorker: TypeAlias = Open | Context | Verify | Close
ToDevice: TypeAlias = Opened | Verified | Received | Gap | Refused
Message: TypeAlias = ToWorker | ToDevice
