"""The trace of an answer in a terminal."""

from __future__ import annotations

import io

from fleet.cli.trace_view import trace_views, traces_of
from fleet.protocol.answer_trace import ReplyTrace, TraceEvent, TraceEventKind, round_trips_of
from fleet.protocol.prompt import Reply
from fleet.utils.console import new_console

EVENTS = (
    TraceEvent(kind=TraceEventKind.STEP, at_ms=0, ms=40, positions=9),
    TraceEvent(kind=TraceEventKind.VERIFY, at_ms=40, num_bytes=900, request=0, drafts=3),
    TraceEvent(kind=TraceEventKind.VERIFY, at_ms=60, num_bytes=900, request=0, drafts=3),
    TraceEvent(kind=TraceEventKind.VERDICT, at_ms=80, num_bytes=80, request=0, kept=1, ms=10),
    TraceEvent(
        kind=TraceEventKind.SETTLE,
        at_ms=81,
        request=0,
        drafts=3,
        kept=1,
        dropped=("\x1b[2J", "[b]"),
    ),
    TraceEvent(kind=TraceEventKind.VERIFY, at_ms=90, num_bytes=90, request=1, drafts=1),
    TraceEvent(kind=TraceEventKind.LOST, at_ms=95, text="worker gone\x1b[31m"),
)


def printed(*traces: ReplyTrace) -> str:
    output = io.StringIO()
    console = new_console(file=output, width=100)
    for view in trace_views(traces):
        console.print(view)
    return output.getvalue()


def test_a_repeated_request_is_one_round_trip() -> None:
    trips = round_trips_of(EVENTS)
    assert [(trip.verify.at_ms, trip.ms) for trip in trips] == [(40, 40), (90, None)]
    assert trips[0].cloud_start_ms == 55
    assert trips[0].dropped == ("\x1b[2J", "[b]")


def test_the_lanes_cover_the_answer_and_texts_cannot_control_the_terminal() -> None:
    text = printed(
        ReplyTrace(at_ms=100, events=EVENTS[:3]), ReplyTrace(at_ms=100, events=EVENTS[3:])
    )
    device, link, cloud = text.splitlines()[:3]
    assert device.rstrip() == "device │" + "█" * 25
    assert set(link.partition("│")[2]) == {" ", "↑", "─", "↓"}
    assert cloud.partition("│")[2].strip() == "█" * 7
    assert "\x1b" not in text
    assert "\\x1b[2J" in text
    assert "95 ms  lost: worker gone" in text


def test_an_answer_without_a_trace_has_no_view() -> None:
    assert traces_of([Reply(seq=0, text="a")]) == ()
    assert printed() == printed(ReplyTrace(at_ms=1)) == ""


def test_omitted_events_are_counted() -> None:
    assert "7 further events" in printed(ReplyTrace(at_ms=9, events=EVENTS[:1], omitted=7))
