"""The result of an answer that every driver on the device reports."""

from __future__ import annotations

import time
from collections import Counter

from msgspec import Struct


class DriverAnswer(Struct, frozen=True, kw_only=True):
    """Times as seen by the app on the device.

    `layer_positions` and `head_calls` are the device's own.
    """

    prompt_tokens: int
    token_ids: tuple[int, ...]
    tokens_from: dict[str, int]
    ttft_ms: float
    total_ms: float
    round_trips: int = 0
    layer_positions: int = 0
    head_calls: int = 0


class Stopwatch:
    """A stopwatch for the tokens of one answer; it starts when it is created."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._first_s = 0.0
        self.token_ids: list[int] = []
        self.sources: Counter[str] = Counter()

    def add(self, token_id: int, source: str) -> None:
        """Add one token, emitted now."""
        self._first_s = self._first_s or time.perf_counter() - self._began
        self.token_ids.append(token_id)
        self.sources[source] += 1

    def answer(
        self,
        prompt_tokens: int,
        *,
        round_trips: int = 0,
        layer_positions: int = 0,
        head_calls: int = 0,
    ) -> DriverAnswer:
        """Return the whole answer, which ends now."""
        total_s = time.perf_counter() - self._began
        return DriverAnswer(
            prompt_tokens=prompt_tokens,
            token_ids=tuple(self.token_ids),
            tokens_from=dict(self.sources),
            ttft_ms=1e3 * self._first_s,
            total_ms=1e3 * total_s,
            round_trips=round_trips,
            layer_positions=layer_positions,
            head_calls=head_calls,
        )
