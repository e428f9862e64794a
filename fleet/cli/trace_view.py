"""The trace of an answer in a terminal: lanes of device, link and cloud, and its round trips."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from rich.text import Text

from fleet.cli.fitted_table import FittedTable
from fleet.protocol.answer_trace import (
    ReplyTrace,
    RoundTrip,
    TraceEvent,
    TraceEventKind,
    round_trips_of,
)
from fleet.protocol.prompt import Reply
from fleet.utils.console import outside_text

LANE_WIDTH: Final = 60
SENT: Final = (TraceEventKind.OPEN, TraceEventKind.UPLOAD, TraceEventKind.VERIFY)
ARRIVED: Final = (TraceEventKind.OPENED, TraceEventKind.VERDICT, TraceEventKind.REFUSED)
NOTES: Final = (TraceEventKind.MODE, TraceEventKind.LOST, TraceEventKind.REFUSED)


def traces_of(replies: Iterable[Reply]) -> tuple[ReplyTrace, ...]:
    """Return the traces of a response."""
    return tuple(reply.trace for reply in replies if reply.trace)


def trace_views(traces: Sequence[ReplyTrace]) -> Iterator[Text | FittedTable]:
    """Yield the lanes of an answer, its round trips, and the notes of its trace."""
    events = sorted((e for trace in traces for e in trace.events), key=lambda event: event.at_ms)
    if not events:
        return
    trips = round_trips_of(events)
    yield _lanes(events, trips, traces[-1].at_ms)
    if trips:
        yield _trips_table(trips)
    for event in _of_kind(events, *NOTES):
        yield outside_text(f"{event.at_ms:,.0f} ms  {event.kind}: {event.text}", "dim")
    if omitted := sum(trace.omitted for trace in traces):
        yield Text(f"{omitted:,} further events are not shown", "dim")


def _of_kind(events: Iterable[TraceEvent], *kinds: TraceEventKind) -> Iterator[TraceEvent]:
    return (event for event in events if event.kind in kinds)


def _lanes(events: Sequence[TraceEvent], trips: Sequence[RoundTrip], end_ms: float) -> Text:
    scale = LANE_WIDTH / max(end_ms, 1e-3)
    device, link, cloud = [[" "] * LANE_WIDTH for _ in range(3)]
    for event in _of_kind(events, TraceEventKind.STEP):
        _draw(device, event.at_ms * scale, (event.at_ms + event.ms) * scale, "█")
    for trip in trips:
        if trip.verdict:
            _draw(link, trip.verify.at_ms * scale, trip.verdict.at_ms * scale, "─")
            start = trip.cloud_start_ms
            _draw(cloud, start * scale, (start + trip.verdict.ms) * scale, "█")
    for event in _of_kind(events, *SENT, *ARRIVED):
        _draw(link, event.at_ms * scale, event.at_ms * scale, "↑" if event.kind in SENT else "↓")
    lines = [
        Text("device │") + Text("".join(device), "green"),
        Text("link   │") + Text("".join(link), "blue"),
        Text("cloud  │") + Text("".join(cloud), "magenta"),
        Text(f"       └ 0 to {end_ms:,.0f} ms", "dim"),
    ]
    return Text("\n").join(lines)


def _draw(lane: list[str], start: float, end: float, sign: str) -> None:
    """Draw a span of columns, at least one."""
    first = min(int(start), LANE_WIDTH - 1)
    last = min(max(first, int(end)), LANE_WIDTH - 1)
    lane[first : last + 1] = sign * (last + 1 - first)


def _trips_table(trips: Sequence[RoundTrip]) -> FittedTable:
    table = FittedTable(title="round trips", title_justify="left")
    for header in ("sent, ms", "took, ms", "cloud, ms", "drafts", "kept"):
        table.add_column(header, justify="right")
    table.add_column("thrown away", overflow="fold")
    for trip in trips:
        cells = [f"{trip.verify.at_ms:,.1f}", "-", "-", str(trip.verify.drafts), "-"]
        if trip.verdict and trip.ms is not None:
            cells[1:] = [
                f"{trip.ms:,.1f}",
                f"{trip.verdict.ms:,.1f}",
                str(trip.verify.drafts),
                str(trip.verdict.kept),
            ]
        table.add_row(*map(outside_text, [*cells, " ".join(map(repr, trip.dropped))]))
    return table
