"""`fleet devices` and `fleet device`: the devices of the fleet."""

from __future__ import annotations

from typing import Annotated

import typer

from fleet.cli.access import call_fleet, fleet_access
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
from fleet.operator_api.device_operations import (
    LIST_DEVICES,
    SHOW_DEVICE,
    DeviceQuery,
    DeviceWindow,
)
from fleet.operator_api.paging import MAX_PAGE, walk_pages
from fleet.utils.console import new_console, outside_text

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
    query = DeviceQuery(group=group, online=online, tag=tag, state=state, limit=MAX_PAGE)
    with fleet_access(folder) as access:
        pages = walk_pages(access, LIST_DEVICES, query)
        rows = [row for page in pages for row in page.devices]
        num_enrolled = len(rows) or access.call(LIST_DEVICES, DeviceQuery(limit=1)).total
    if as_json:
        print_json(rows)
    elif rows:
        print_devices(new_console(), rows)
    elif num_enrolled:
        print(f"devices: none of {num_enrolled} matches these options; leave one out")
    else:
        print("devices: none yet; enrol one with 'fleet enroll NAME'")


def device(
    name: DeviceArgument,
    since: SinceOption = None,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one device in detail: its last status, its counts and its latest sessions."""
    shown = call_fleet(folder, SHOW_DEVICE, DeviceWindow(device=name, since=parse_since(since)))
    if as_json:
        print_json({"device": shown.device, "stats": shown.stats, "sessions": shown.sessions})
        return
    console = new_console()
    print_devices(console, [shown.device])
    print_stats(console, [shown.stats], "answers")
    for reason, times in shown.stats.switches.items():
        console.print(outside_text(switch_text(reason, times)))
    print_sessions(console, shown.sessions, "latest sessions")
