"""Tables at 80 columns: no value is cut."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from msgspec import Struct
from rich.console import Console

from fleet.cli.audit import print_changes
from fleet.cli.identities import identities_table
from fleet.cli.sessions import print_sessions
from fleet.cli.views import print_rows
from fleet.cli.workers import print_workers
from fleet.registry.results import AuditRow, IdentityRow, SessionRow, WorkerRow
from fleet.utils.console import new_console

DIGEST = "0123456789abcdef" * 2
AT = 1_800_000_000.0  # 2027-01-15 08:00:00 UTC
SESSION = SessionRow(
    session=DIGEST,
    device="kitchen-thermo-17",
    worker="basement-worker-2",
    opened_at=AT,
    generations=1,
    tokens=12_345,
    bytes_up=123_456_789,
    bytes_down=98_765_432,
)
WORKER = WorkerRow(
    worker="basement-worker-2",
    online=True,
    draining=True,
    bundle_ids=(DIGEST, "f" * 32),
    num_sessions=1,
    version="0.1.0",
    last_seen=AT,
)
CHANGE = AuditRow(
    at=AT,
    actor="operator@gateway",
    action="enroll",
    subject="kitchen-thermo-17",
    details={"role": "device", "tags": {"floor": "1"}, "serial": DIGEST, "group": None},
)


class Wide(Struct, frozen=True):
    """A row whose words do not fit side by side."""

    first: str
    second: str
    third: int


def printed(print_table: Callable[[Console], None]) -> str:
    out = io.StringIO()
    print_table(new_console(file=out, width=80))
    text = out.getvalue()
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    return text


@pytest.mark.parametrize(
    ("print_table", "row", "values"),
    [
        (
            lambda console, rows: print_sessions(console, rows, "sessions"),
            SESSION,
            ["01234567 ", "UTC", SESSION.device, "2027-01-15 08:00:00", "123,456,789", "1 answer "],
        ),
        (print_workers, WORKER, [WORKER.worker, "draining", "01234567", "ffffffff", "1 session "]),
        (
            print_changes,
            CHANGE,
            ["2027-01-15 08:00:00", CHANGE.actor, CHANGE.subject, 'tags={"floor":"1"}'],
        ),
    ],
)
def test_each_value_can_be_read(
    print_table: Callable[[Console, Any], None], row: Struct, values: list[str]
) -> None:
    text = printed(lambda console: print_table(console, [row]))
    for value in values:
        assert value in text
    assert "none yet" in printed(lambda console: print_table(console, []))


def test_rows_too_wide_for_a_table_become_a_list() -> None:
    rows = [Wide("a" * 45, "b" * 45, 1234), Wide("short", "c" * 70, 5)]
    lines = printed(lambda console: print_rows(console, rows, "rows", as_json=False)).splitlines()
    assert [line.split() for line in lines] == [
        ["rows"],
        [],
        ["first", "a" * 45],
        ["second", "b" * 45],
        ["third", "1,234"],
        [],
        ["first", "short"],
        ["second", "c" * 70],
        ["third", "5"],
    ]


def test_a_table_in_a_narrow_terminal_becomes_a_list_with_each_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = IdentityRow(
        name="kitchen-thermo-17",
        role="device",
        state="active",
        group="kitchen",
        tags={"floor": "1"},
        targets=("hall",),
        fingerprint="0" * 64,
        created_at=AT,
        not_after=AT,
    )
    out = io.StringIO()
    monkeypatch.setenv("COLUMNS", "3")
    new_console(file=out).print(identities_table([row]))
    words = "".join(line[10:].strip() for line in out.getvalue().splitlines())
    assert words == "kitchen-thermo-17deviceactivekitchenfloor=1hall2027-01-1508:00 UTC"
