"""`fleet alarms`: alarms, their history and acknowledgement, their rules and silences."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Final, get_args

import typer
from rich.console import Console

from fleet.cli.access import call_fleet, fleet_access, latest_rows
from fleet.cli.config import AllOption, TargetGroupOption, parse_target
from fleet.cli.fitted_table import FittedTable
from fleet.cli.options import (
    MAX_ROWS,
    TO_THE_SECOND,
    HomeOption,
    JsonOption,
    checked_name,
    format_span,
    format_time,
    parse_span,
    print_json,
)
from fleet.cli.views import cell_of, lines_table
from fleet.errors import ConfigError
from fleet.operator_api.alarm_operations import (
    ACKNOWLEDGE_ALARMS,
    LIST_ALARM_EVENTS,
    LIST_ALARM_RULES,
    LIST_ALARMS,
    MUTE_ALARMS,
    SET_ALARM_RULE,
    UNSET_ALARM_RULE,
    Acknowledgement,
    AlarmEventQuery,
    AlarmQuery,
    AlarmRuleChange,
    AlarmRuleKey,
    AlarmRuleList,
    AlarmRuleQuery,
    AlarmSilence,
    MergedAlarmRule,
    TargetAlarmRule,
)
from fleet.operator_api.paging import MAX_PAGE, walk_pages
from fleet.registry.alarms.alarm_kinds import AlarmKind
from fleet.registry.alarms.alarm_rows import AlarmEvent, AlarmFilterState, AlarmRow
from fleet.registry.alarms.rules import MAX_MUTE_S, THRESHOLDS, check_delay
from fleet.utils.command_group import CommandGroup
from fleet.utils.console import new_console, outside_text
from fleet.utils.printable import count, print_line

KINDS: Final = ", ".join(AlarmKind)
STATES: Final = get_args(AlarmFilterState)
MAX_NOTE: Final = 1000
MAX_THRESHOLD: Final = max(known.high for known in THRESHOLDS.values())

app = typer.Typer(
    cls=CommandGroup,
    invoke_without_command=True,
    help="List and acknowledge alarms; set their rules and mute them.",
)

KindArgument = Annotated[str, typer.Argument(metavar="KIND", help=f"One of {KINDS}.")]
MutedKindArgument = Annotated[
    str | None, typer.Argument(metavar="[KIND]", help=f"Only one of {KINDS} (default: all).")
]
KindOption = Annotated[str | None, typer.Option(help=f"Only one of {KINDS}.")]
SubjectOption = Annotated[
    str | None, typer.Option(help="Only of this device, worker, bundle:ID or rollout:ID.")
]
StateOption = Annotated[str, typer.Option(help=f"One of {', '.join(STATES)}.")]
LimitOption = Annotated[int, typer.Option(min=1, max=MAX_ROWS, help="Maximum number.")]
TargetDeviceOption = Annotated[
    str | None, typer.Option("--device", help="Target this device.", callback=checked_name)
]
AboveOption = Annotated[
    float | None,
    typer.Option(
        "--above",
        "--threshold",
        min=0,
        max=MAX_THRESHOLD,
        help="Threshold: a share such as 0.8; days for certificate, sessions for worker, the least "
        "agreement for agreement.",
    ),
]
ForOption = Annotated[
    str | None, typer.Option("--for", help="Fire after this time, such as 0s, 10m or 2h.")
]
EnabledOption = Annotated[bool | None, typer.Option("--on/--off", help="Switch it on or off.")]
SilenceOption = Annotated[str, typer.Option("--for", help="Length of the silence, such as 2h.")]
NoteOption = Annotated[str, typer.Option(help="Note for others who look.")]
IdsArgument = Annotated[
    list[int],
    typer.Argument(metavar="ID...", help="Ids of alarms; see `fleet alarms list`.", min=1),
]


@app.callback()
def alarms(context: typer.Context) -> None:
    """List the open alarms, as `fleet alarms list`."""
    if context.invoked_subcommand is None:
        list_alarms()


@app.command("list")
def list_alarms(
    state: StateOption = "open",
    kind: KindOption = None,
    subject: SubjectOption = None,
    limit: LimitOption = 100,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List alarms, the newest first; by default those that fire."""
    query = AlarmQuery(
        state=parse_alarm_state(state),
        kind=None if kind is None else parse_alarm_kind(kind),
        subject=subject,
        limit=min(limit, MAX_PAGE),
    )
    with fleet_access(folder) as access:
        pages = walk_pages(access, LIST_ALARMS, query)
        rows = latest_rows((page.alarms for page in pages), limit)
    if as_json:
        print_json(rows)
    else:
        print_alarms(new_console(), rows)


def parse_alarm_kind(text: str) -> AlarmKind:
    """Return a kind. Raises ConfigError, which names all."""
    try:
        return AlarmKind(text)
    except ValueError:
        raise ConfigError(
            f"no such kind of alarms: {text[:80]!r}; expected one of {KINDS}"
        ) from None


def parse_alarm_state(text: str) -> AlarmFilterState:
    """Return the state of a filter. Raises ConfigError, which names all."""
    for state in STATES:
        if state == text:
            return state  # type: ignore[no-any-return]
    raise ConfigError(f"no such state: {text[:80]!r}; expected one of {', '.join(STATES)}")


def print_alarms(console: Console, rows: Sequence[AlarmRow]) -> None:
    """Print alarms as a table that fits a terminal."""
    table = lines_table("alarms", ("id, kind", "since, state (UTC)", "alarm"))
    for row in rows:
        note = f"{row.acknowledged_by}: {row.note or 'acknowledged'}" if row.acknowledged_by else ""
        table.add_row(
            cell_of(str(row.id), row.kind),
            cell_of(format_time(row.fired_at, TO_THE_SECOND), _state(row)),
            cell_of(row.summary, *filter(None, [note])),
        )
    console.print(table if rows else "alarms: none")


def _state(row: AlarmRow) -> str:
    if row.resolved_at is not None:
        return f"resolved {format_time(row.resolved_at, TO_THE_SECOND)}"
    muted = "" if row.muted_until is None else f", muted until {format_time(row.muted_until)}"
    return f"{'acknowledged' if row.acknowledged_by else row.state}{muted}"


@app.command()
def history(
    kind: KindOption = None,
    subject: SubjectOption = None,
    limit: LimitOption = 100,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the changes of alarms, the newest first."""
    parsed = None if kind is None else parse_alarm_kind(kind)
    query = AlarmEventQuery(kind=parsed, subject=subject, limit=min(limit, MAX_PAGE))
    with fleet_access(folder) as access:
        pages = walk_pages(access, LIST_ALARM_EVENTS, query)
        rows = latest_rows((page.events for page in pages), limit)
    if as_json:
        print_json(rows)
    else:
        _print_events(new_console(), rows)


def _print_events(console: Console, rows: Sequence[AlarmEvent]) -> None:
    table = lines_table("history of the alarms", ("time, UTC, and actor", "change", "alarm"))
    for row in rows:
        table.add_row(
            cell_of(format_time(row.at, TO_THE_SECOND), row.by),
            cell_of(row.state, f"{row.kind} {row.alarm}"),
            cell_of(row.summary, *filter(None, [row.note])),
        )
    console.print(table if rows else "history of the alarms: none yet")


@app.command("ack")
def acknowledge_alarms(
    ids: IdsArgument,
    note: NoteOption = "",
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Acknowledge alarms under your name."""
    if len(note) > MAX_NOTE:
        raise ConfigError(f"note: expected at most {MAX_NOTE} characters, got {len(note)}")
    request = Acknowledgement(alarms=tuple(ids), note=note)
    rows = call_fleet(folder, ACKNOWLEDGE_ALARMS, request).alarms
    if as_json:
        print_json(rows)
    else:
        print_line(f"acknowledged: {', '.join(row.summary for row in rows)}")


@app.command("rules")
def show_rules(
    device: TargetDeviceOption = None,
    group: TargetGroupOption = None,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the rules for all devices, a group or a device, and those that targets set."""
    everywhere = device is None and group is None
    target = parse_target([device] if device else [], group, everywhere=everywhere)
    shown = call_fleet(folder, LIST_ALARM_RULES, AlarmRuleQuery(target=str(target)))
    _print_rules(shown, as_json=as_json)


@app.command("set")
def set_rule(
    kind: KindArgument,
    device: TargetDeviceOption = None,
    group: TargetGroupOption = None,
    everywhere: AllOption = False,
    above: AboveOption = None,
    after: ForOption = None,
    enabled: EnabledOption = None,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set a rule: `fleet alarms set offload --group lab --above 0.5 --for 10m`."""
    target = parse_target([device] if device else [], group, everywhere=everywhere)
    change = AlarmRuleChange(
        target=str(target),
        kind=parse_alarm_kind(kind),
        enabled=enabled,
        threshold=above,
        for_s=None if after is None else check_delay(parse_span(after)),
    )
    _print_rules(call_fleet(folder, SET_ALARM_RULE, change), as_json=as_json)


@app.command("unset")
def unset_rule(
    kind: KindArgument,
    device: TargetDeviceOption = None,
    group: TargetGroupOption = None,
    everywhere: AllOption = False,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove a rule of a target with its silence, so that a wider scope decides again."""
    target = parse_target([device] if device else [], group, everywhere=everywhere)
    key = AlarmRuleKey(target=str(target), kind=parse_alarm_kind(kind))
    _print_rules(call_fleet(folder, UNSET_ALARM_RULE, key), as_json=as_json)


@app.command()
def mute(
    kind: MutedKindArgument = None,
    device: TargetDeviceOption = None,
    group: TargetGroupOption = None,
    everywhere: AllOption = False,
    span: SilenceOption = "1h",
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send no events of alarms for a time; 0s ends a silence."""
    target = parse_target([device] if device else [], group, everywhere=everywhere)
    for_s = parse_span(span)
    if for_s > MAX_MUTE_S:
        raise ConfigError(f"--for {span}: expected at most {format_span(MAX_MUTE_S)}")
    parsed = None if kind is None else parse_alarm_kind(kind)
    silence = AlarmSilence(target=str(target), kind=parsed, for_s=for_s)
    _print_rules(call_fleet(folder, MUTE_ALARMS, silence), as_json=as_json)


def _print_rules(shown: AlarmRuleList, *, as_json: bool) -> None:
    if as_json:
        print_json(shown)
        return
    headers = ("kind", "on", "threshold", "for", "muted until (UTC)")
    title = outside_text(f"rules for {shown.target}")
    table = FittedTable(title=title, title_justify="left")
    for header in headers:
        table.add_column(header, overflow="fold")
    for rule in shown.rules:
        table.add_row(*_rule_cells(rule))
    new_console().print(table)
    number = len(shown.own)
    print_line(f"{count(number, 'rule')} set" + (":" if number else ": all rules are built in"))
    for own in shown.own:
        print_line(f"  {_own_rule(own)}")


def _rule_cells(rule: MergedAlarmRule) -> list[str]:
    threshold = "-" if rule.threshold is None else f"{rule.threshold:g}"
    if rule.unit:
        threshold += f", {rule.unit}"
    delay = format_span(rule.for_s) if rule.for_s else "at once"
    muted = _silence(rule.muted_until) or "-"
    return [rule.kind, "yes" if rule.enabled else "no", threshold, delay, muted]


def _own_rule(rule: TargetAlarmRule) -> str:
    values = {
        "on": rule.enabled,
        "threshold": rule.threshold,
        "for_s": rule.for_s,
        "muted_until": None if rule.muted_until is None else _silence(rule.muted_until) or "ended",
    }
    shown = ", ".join(f"{name}={value}" for name, value in values.items() if value is not None)
    return f"{rule.target} {rule.kind}: {shown}"


def _silence(muted_until: float) -> str:
    """Return the end of a silence; "" if it is over."""
    return format_time(muted_until) if muted_until > time.time() else ""
