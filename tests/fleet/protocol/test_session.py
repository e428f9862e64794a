"""The new rows of a chunk, and the legal order of events."""

import pytest

from fleet.errors import OutOfOrderError
from fleet.protocol.session import LEGAL, LinkEvent, LinkState, advance, new_rows

STATES = [
    ("idle", "open", "opening"),
    ("idle", "close", "closed"),
    ("opening", "opened", "open"),
    ("opening", "refused", "lost"),
    ("opening", "timeout", "lost"),
    ("opening", "close", "closed"),
    ("open", "refused", "lost"),
    ("open", "timeout", "lost"),
    ("open", "worker_gone", "lost"),
    ("open", "close", "closed"),
    ("lost", "open", "opening"),
    ("lost", "opened", "open"),
    ("lost", "close", "closed"),
]
ILLEGAL = [
    (state, event) for state in LinkState for event in LinkEvent if (state, event) not in LEGAL
]


@pytest.mark.parametrize(
    ("received", "start", "count", "expected"),
    [
        (0, 0, 5, 5),
        (5, 5, 3, 3),
        (5, 3, 4, 2),
        (5, 0, 5, 0),
        (5, 2, 1, 0),
        (5, 0, 9, 4),
        (5, 6, 1, None),
        (0, 1, 1, None),
    ],
)
def test_a_chunk_adds_what_is_not_there_yet_and_nothing_behind_a_gap(
    received: int, start: int, count: int, expected: int | None
) -> None:
    assert new_rows(received, start, count) == expected


@pytest.mark.parametrize(("state", "event", "following"), STATES)
def test_a_legal_event_leads_to_the_state_of_the_table(
    state: str, event: str, following: str
) -> None:
    assert advance(LinkState(state), LinkEvent(event)) is LinkState(following)


def test_the_table_above_is_the_whole_table() -> None:
    assert {(LinkState(state), LinkEvent(event)) for state, event, _ in STATES} == set(LEGAL)


@pytest.mark.parametrize(("state", "event"), ILLEGAL)
def test_any_other_event_is_refused_with_the_legal_ones(state: LinkState, event: LinkEvent) -> None:
    with pytest.raises(OutOfOrderError, match=f"a session that is {state} expects .*; got {event}"):
        advance(state, event)


def test_every_state_that_is_not_closed_can_be_closed() -> None:
    open_states = [state for state in LinkState if state is not LinkState.CLOSED]
    assert all((state, LinkEvent.CLOSE) in LEGAL for state in open_states)
