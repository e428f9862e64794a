"""Annotated types that several messages share. Each limit is part of the wire protocol."""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias

from msgspec import Meta

MAX_POSITIONS: Final = 1 << 20
MAX_LABEL_LENGTH: Final = 200
MAX_DEADLINE_MS: Final = 600_000
MAX_BIASES: Final = 300
MAX_TOP_LOGPROBS: Final = 20
DAY_S: Final = 86_400

Id: TypeAlias = Annotated[str, Meta(pattern=r"\A[a-z0-9][a-z0-9_-]{0,62}\Z")]
SoftwareVersion: TypeAlias = Annotated[str, Meta(pattern=r"\A[0-9][0-9a-z.+]{0,62}\Z")]
Label: TypeAlias = Annotated[str, Meta(max_length=MAX_LABEL_LENGTH)]
Text: TypeAlias = Annotated[str, Meta(max_length=1000)]
Port: TypeAlias = Annotated[int, Meta(ge=1, le=65535)]

Position: TypeAlias = Annotated[int, Meta(ge=0, lt=MAX_POSITIONS)]
Count: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_POSITIONS)]
TokenId: TypeAlias = Annotated[int, Meta(ge=0, lt=1 << 31)]
Bias: TypeAlias = Annotated[float, Meta(ge=-100, le=100)]
LogitBias: TypeAlias = Annotated[tuple[tuple[TokenId, Bias], ...], Meta(max_length=MAX_BIASES)]
Source: TypeAlias = Annotated[str, Meta(pattern=r"\A(exit:[0-9]{1,4}|cloud|fallback|lookup)\Z")]

Seed: TypeAlias = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Temperature: TypeAlias = Annotated[float, Meta(ge=0, le=5)]
TopP: TypeAlias = Annotated[float, Meta(gt=0, le=1)]
TopK: TypeAlias = Annotated[int, Meta(ge=0, le=1000)]
StopText: TypeAlias = Annotated[str, Meta(min_length=1, max_length=256)]
StopTexts: TypeAlias = Annotated[tuple[StopText, ...], Meta(max_length=4)]
RepetitionPenalty: TypeAlias = Annotated[float, Meta(ge=0.1, le=10)]
Penalty: TypeAlias = Annotated[float, Meta(ge=-2, le=2)]
TopLogprobs: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]
NumChoices: TypeAlias = Annotated[int, Meta(ge=1, le=4)]
SystemPrompt: TypeAlias = Annotated[str, Meta(max_length=8000)]
MaxNewTokens: TypeAlias = Annotated[int, Meta(ge=1, le=100_000)]
Threshold: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]

Layer: TypeAlias = Annotated[int, Meta(ge=1, le=9999)]
Split: TypeAlias = Literal["auto"] | Layer
Provider: TypeAlias = Literal["auto", "cpu", "cuda"]

DeadlineMs: TypeAlias = Annotated[int, Meta(ge=1, le=MAX_DEADLINE_MS)]
TargetTpotMs: TypeAlias = Annotated[float, Meta(gt=0, le=600_000)]
Milliseconds: TypeAlias = Annotated[float, Meta(ge=0, le=1e12)]
# Seconds since 1970, UTC, up to the year 9999, the last one that a calendar can show.
Timestamp: TypeAlias = Annotated[float, Meta(ge=0, lt=253_402_300_800)]
Amount: TypeAlias = Annotated[int, Meta(ge=0, le=1 << 53)]
