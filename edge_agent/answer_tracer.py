"""The recorder of an answer's trace, for requests that ask for one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from fleet.protocol.answer_trace import (
    MAX_EVENTS,
    MAX_TEXT_LENGTH,
    ReplyTrace,
    TraceEvent,
    TraceEventKind,
    Verdict,
)
from fleet.protocol.messages import (
    MAX_DRAFT,
    Close,
    Context,
    Gap,
    Open,
    Opened,
    Received,
    Refused,
    ToDevice,
    ToWorker,
    Verified,
    Verify,
)
from fleet.protocol.report import Switch

KINDS: Final[dict[type[Any], TraceEventKind]] = {
    Open: TraceEventKind.OPEN,
    Context: TraceEventKind.UPLOAD,
    Verify: TraceEventKind.VERIFY,
    Close: TraceEventKind.CLOSE,
    Opened: TraceEventKind.OPENED,
    Received: TraceEventKind.RECEIPT,
    Gap: TraceEventKind.RECEIPT,
    Verified: TraceEventKind.VERDICT,
    Refused: TraceEventKind.REFUSED,
}
MIN_LOGPROB: Final = -9999.0


@dataclass(frozen=True, kw_only=True)
class TokenOrigin:
    """The origin of the token at one place of the text; the fields are those of `ReplyTrace`."""

    exit_layer: int | None = None
    is_proposed: bool = False
    verdict: Verdict | None = None
    request: int | None = None


class AnswerTracer:
    """The events of one answer whose prompt arrived at `arrived_at`, a monotonic time.

    Any thread may record events; the generating thread alone records and takes tokens. A place is
    an index of the text, which begins with the `num_prompt` tokens of the prompt. `text_of` returns
    the text of a token.
    """

    def __init__(self, arrived_at: float, num_prompt: int, text_of: Callable[[int], str]) -> None:
        self._arrived_at = arrived_at
        self._next_place = num_prompt
        self._text_of = text_of
        self._events: deque[TraceEvent] = deque()
        self._num_omitted = 0
        self._origins: dict[int, TokenOrigin] = {}
        self._num_switches = 0
        began_at = self._ms(time.monotonic())
        self._add(TraceEvent(kind=TraceEventKind.QUEUE, at_ms=0.0, ms=began_at))

    def step(self, started: float, positions: int, *, proposed: int = 0, kept: int = 0) -> None:
        """Record a step of the lower layers that began at the monotonic time `started`."""
        begin = self._ms(started)
        end = self._ms(time.monotonic())
        event = TraceEvent(
            kind=TraceEventKind.STEP,
            at_ms=begin,
            ms=round(end - begin, 3),
            positions=positions,
            drafts=proposed,
            kept=kept,
        )
        self._add(event)

    def message(self, message: ToWorker | ToDevice, num_bytes: int, time_s: float) -> None:
        """Record a message that was sent or has arrived at the monotonic time `time_s`."""
        event = TraceEvent(
            kind=KINDS[type(message)],
            at_ms=self._ms(time_s),
            num_bytes=num_bytes,
            **_facts(message),
        )
        self._add(event)

    def note(self, kind: TraceEventKind, text: str) -> None:
        """Record an event that only a text explains."""
        at_ms = self._ms(time.monotonic())
        self._add(TraceEvent(kind=kind, at_ms=at_ms, text=text[:MAX_TEXT_LENGTH]))

    def settle(
        self, request: int | None, num_drafts: int, kept: int, dropped: Iterable[int]
    ) -> None:
        """Record the end of drafts; `dropped` are the tokens that are not in the answer."""
        texts = [self._text_of(token_id)[:MAX_TEXT_LENGTH] for token_id in dropped]
        event = TraceEvent(
            kind=TraceEventKind.SETTLE,
            at_ms=self._ms(time.monotonic()),
            request=request,
            drafts=num_drafts,
            kept=kept,
            dropped=tuple(texts[: 2 * MAX_DRAFT]),
        )
        self._add(event)

    def origin(self, place: int, origin: TokenOrigin) -> None:
        """Record where the token at a place comes from, in place of an earlier one."""
        self._origins[place] = origin

    def judge(self, place: int, request: int, *, is_accepted: bool) -> None:
        """Record the cloud's verdict on the draft at a place."""
        origin = self._origins.get(place, TokenOrigin()) if is_accepted else TokenOrigin()
        verdict: Verdict = "accepted" if is_accepted else "corrected"
        self._origins[place] = replace(origin, verdict=verdict, request=request)

    def token(self, logprob: float, switches: Sequence[Switch]) -> ReplyTrace:
        """Return the trace for the reply with the next token of the answer."""
        for switch in switches[self._num_switches :]:
            self.note(TraceEventKind.MODE, f"{switch.mode}: {switch.reason}")
        self._num_switches = len(switches)
        origin = self._origins.pop(self._next_place, TokenOrigin())
        self._next_place += 1
        events, omitted = self._take()
        return ReplyTrace(
            at_ms=self._ms(time.monotonic()),
            logprob=round(min(0.0, max(MIN_LOGPROB, logprob)), 4),
            exit_layer=origin.exit_layer,
            is_proposed=origin.is_proposed,
            verdict=origin.verdict,
            request=origin.request,
            events=events,
            omitted=omitted,
        )

    def end(self) -> ReplyTrace:
        """Return the trace for a reply without a token."""
        events, omitted = self._take()
        return ReplyTrace(at_ms=self._ms(time.monotonic()), events=events, omitted=omitted)

    def _ms(self, time_s: float) -> float:
        return round(max(0.0, time_s - self._arrived_at) * 1000, 3)

    def _add(self, event: TraceEvent) -> None:
        if len(self._events) < MAX_EVENTS:
            self._events.append(event)
        else:
            self._num_omitted += 1

    def _take(self) -> tuple[tuple[TraceEvent, ...], int]:
        num_events = len(self._events)  # other threads only append
        events = tuple(self._events.popleft() for _ in range(num_events))
        omitted = self._num_omitted
        self._num_omitted = 0
        return events, omitted


def _facts(message: ToWorker | ToDevice) -> dict[str, Any]:
    """Return the fields of an event that a message determines."""
    match message:
        case Context(chunk=chunk):
            return {"positions": chunk.count}
        case Verify(chunk=chunk):
            positions = chunk.count if chunk else 0
            return {
                "request": message.request,
                "drafts": len(message.draft),
                "positions": positions,
            }
        case Verified():
            return {
                "request": message.request,
                "kept": message.accepted,
                "ms": message.busy_ms,
            }
        case Opened():
            return {"text": message.worker}
        case Refused():
            return {"text": f"{message.code}: {message.message}"[:MAX_TEXT_LENGTH]}
        case _:
            return {}
