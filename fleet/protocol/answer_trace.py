"""The trace of an answer: the origin of each token, and what device, link and cloud did when."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Final, Literal, TypeAlias

from msgspec import Meta, Struct

from fleet.protocol.messages import MAX_DRAFT
from fleet.protocol.types import Amount, Count, Layer, Milliseconds

MAX_EVENTS: Final = 1000
"""The events in one reply; a device counts those beyond it in `omitted`."""
MAX_TEXT_LENGTH: Final = 300

Verdict: TypeAlias = Literal["accepted", "corrected"]
TraceText: TypeAlias = Annotated[str, Meta(max_length=MAX_TEXT_LENGTH)]


class TraceEventKind(StrEnum):
    """The kind of an event.

    Of the device: `queue` is the time before the answer began. `step` is one step of the lower
    layers, with the positions that it ran, the tokens that were proposed for it and those kept.
    `settle` is the end of `drafts`: `kept` of them are in the answer, and `dropped` are the texts
    of the others. `mode` is a change of the mode and `lost` the loss of the session, each with its
    reason as `text`.

    Messages to the worker: `open`, `upload`, `verify`, `close`. Messages from the worker: `opened`
    with its name as `text`, `receipt`, `verdict`, `refused` with the reason. A `verify` and its
    `verdict` have the same `request`. `ms` of a verdict is the time that the worker held the
    request.
    """

    QUEUE = "queue"
    STEP = "step"
    SETTLE = "settle"
    MODE = "mode"
    LOST = "lost"
    OPEN = "open"
    UPLOAD = "upload"
    VERIFY = "verify"
    CLOSE = "close"
    OPENED = "opened"
    RECEIPT = "receipt"
    VERDICT = "verdict"
    REFUSED = "refused"


class TraceEvent(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One event of an answer. `at_ms` counts from the arrival of the prompt, as `ms` its duration.

    A field that the kind of the event does not need is 0 or empty.
    """

    kind: TraceEventKind
    at_ms: Milliseconds
    ms: Milliseconds = 0.0
    num_bytes: Amount = 0
    positions: Count = 0
    request: Amount | None = None
    drafts: Count = 0
    kept: Count = 0
    dropped: Annotated[tuple[TraceText, ...], Meta(max_length=2 * MAX_DRAFT)] = ()
    text: TraceText = ""


class ReplyTrace(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The part of the trace that one reply has: its token's origin, and the events before it.

    `logprob` is at temperature 1. `exit_layer` is that of the exit which chose the token, also
    where the cloud judged it. `is_proposed` means that the token was copied from an earlier text
    before the exit ran. `verdict` is the cloud's on the draft in the token's place, in the verdict
    on `request`. `omitted` counts events that the reply has no room for.
    """

    at_ms: Milliseconds
    logprob: Annotated[float, Meta(ge=-1e6, le=0)] | None = None
    exit_layer: Layer | None = None
    is_proposed: bool = False
    verdict: Verdict | None = None
    request: Amount | None = None
    events: Annotated[tuple[TraceEvent, ...], Meta(max_length=MAX_EVENTS)] = ()
    omitted: Amount = 0


class RoundTrip(Struct, frozen=True, kw_only=True):
    """A verify request and its verdict, which is None if none came. Times in milliseconds."""

    verify: TraceEvent
    verdict: TraceEvent | None
    dropped: tuple[str, ...]

    @property
    def ms(self) -> float | None:
        return self.verdict.at_ms - self.verify.at_ms if self.verdict else None

    @property
    def cloud_start_ms(self) -> float:
        """The time at which the worker began, if both ways of the link take equally long."""
        if self.verdict is None:
            return self.verify.at_ms
        return max(
            self.verify.at_ms, (self.verify.at_ms + self.verdict.at_ms - self.verdict.ms) / 2
        )


def round_trips_of(events: Sequence[TraceEvent]) -> list[RoundTrip]:
    """Return the verify requests in order of time, a repeated one once."""
    verdicts = {event.request: event for event in events if event.kind is TraceEventKind.VERDICT}
    settled = {event.request: event for event in events if event.kind is TraceEventKind.SETTLE}
    first: dict[int | None, TraceEvent] = {}
    for event in sorted(events, key=lambda event: event.at_ms):
        if event.kind is TraceEventKind.VERIFY:
            first.setdefault(event.request, event)
    return [
        RoundTrip(
            verify=verify,
            verdict=verdicts.get(request),
            dropped=settled[request].dropped if request in settled else (),
        )
        for request, verify in first.items()
    ]
