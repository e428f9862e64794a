"""`fleet devices` and `fleet device`: the devices of the fleet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer

from fleet.cli.options import (
    DeviceArgument,
    GroupOption,
    HomeOption,
    JsonOption,
    SinceOption,
    parse_since,
    print_json,
)
from fleet.cli.sessions import print_sessions
from fleet.cli.stats_views import print_devices, print_stats, switch_text
from fleet.identity.enrolment import format_tags
from fleet.server.home import FleetHome
from fleet.utils.console import new_console, outside_text

if TYPE_CHECKING:
    from fleet.registry.results import DeviceRow

NUM_SESSIONS: Final = 5

OnlineOption = Annotated[
    bool | None, typer.Option("--online/--offline", help="Only devices that are online or offline.")
]
TagOption = Annotated[str | None, typer.Option(help="Only devices with this tag, like floor=1.")]
StateOption = Annotated[
    str | None, typer.Option(help="Only devices that are pending, active, revoked, ...")
]


def devices(
    group: GroupOption = None,
    online: OnlineOption = None,
    tag: TagOption = None,
    state: StateOption = None,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the devices: online or not, bundle, last seen."""

    def is_shown(row: DeviceRow) -> bool:
        return (
            (group is None or row.group == group)
            and (online is None or row.online == online)
            and (tag is None or tag in format_tags(row.tags))
            and (state is None or row.state == state)
        )

    with FleetHome.load(folder).registry() as registry:
        enrolled = registry.stats.devices()
    rows = [row for row in enrolled if is_shown(row)]
    if as_json:
        print_json(rows)
    elif rows:
        print_devices(new_console(), rows)
    elif enrolled:
        print(f"devices: none of {len(enrolled)} matches these options; leave one out")
    else:
        print("devices: none yet; enrol one with 'fleet enroll NAME'")


def device(
    name: DeviceArgument,
    since: SinceOption = None,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one device in detail: its last status, its counts and its latest sessions."""
    with FleetHome.load(folder).registry() as registry:
        (counts,) = registry.stats.per_device(name, parse_since(since))
        row = registry.stats.device(name)
        sessions = registry.stats.sessions(name, NUM_SESSIONS)
    if as_json:
        print_json({"device": row, "stats": counts, "sessions": sessions})
        return
    console = new_console()
    print_devices(console, [row])
    print_stats(console, [counts], "answers")
    for reason, times in counts.switches.items():
        console.print(outside_text(switch_text(reason, times)))
    print_sessions(console, sessions, "latest sessions")
