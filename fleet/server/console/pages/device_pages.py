"""The devices, and one of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

from aiohttp import web

from fleet.identity.enrolment import format_tags, parse_tags
from fleet.operator_api.device_operations import (
    LIST_DEVICES,
    MOVE_DEVICE,
    SHOW_DEVICE,
    TAG_DEVICE,
    DeviceQuery,
    DeviceWindow,
    GroupChange,
    TagChange,
)
from fleet.operator_api.identity_operations import RESUME, REVOKE, SUSPEND, IdentityKey
from fleet.operator_api.settings_operations import SHOW_SETTINGS, SettingsTarget
from fleet.operator_api.stats_operations import LIST_HOUR_STATS, StatsWindow
from fleet.protocol.types import DAY_S
from fleet.server.console.pages.page import Page, result_of, see

PAGE_ROWS: Final = 50
SORTS: Final = ("name", "-last_seen", "last_seen")
NOTHING: Final[Mapping[str, str]] = {}
CHANGES: Final = {
    "suspend": (SUSPEND, "suspended"),
    "resume": (RESUME, "restored"),
    "revoke": (REVOKE, "revoked"),
}


async def devices_page(page: Page) -> web.StreamResponse:
    """Show a page of the devices that match the address."""
    sort = page.query("sort")
    status = page.query("status")
    query = DeviceQuery(
        search=page.query("search"),
        group=page.query("group"),
        tag=page.query("tag"),
        state=page.query("state"),
        online=None if status is None else status == "online",
        sort=sort if sort in SORTS else "name",  # type: ignore[arg-type]
        after=page.query("after"),
        limit=PAGE_ROWS,
        since=time.time() - DAY_S,
    )
    found = await page.call(LIST_DEVICES, query)
    return page.show(
        "devices.html",
        devices=found.devices,
        total=found.total,
        stats={row.device: row for row in found.stats},
        query=query,
        next_address=found.next_page and page.address(after=found.next_page),
    )


async def device_page(page: Page) -> web.StreamResponse:
    """Show one device."""
    return await _show_device(page, page.request.match_info["device"])


async def _show_device(
    page: Page, name: str, entered: Mapping[str, str] = NOTHING, problem: str = ""
) -> web.Response:
    since = time.time() - DAY_S
    details = await page.call(SHOW_DEVICE, DeviceWindow(device=name, since=since))
    settings = await page.call(SHOW_SETTINGS, SettingsTarget(target=f"device:{name}"))
    hours = await page.call(LIST_HOUR_STATS, StatsWindow(device=name, since=since, limit=48))
    tags = " ".join(format_tags(details.device.tags))
    return page.show(
        "device.html",
        400 if problem else 200,
        details=details,
        settings=settings,
        hours=hours.rows,
        group=entered.get("group", details.device.group or ""),
        shown_tags=tags,
        tags=entered.get("tags", tags),
        problem=problem,
    )


async def change_device_form(page: Page) -> web.StreamResponse:
    """Suspend, resume or revoke a device, or change its group or its tags."""
    name = page.request.match_info["device"]
    change = page.request.match_info["change"]
    if change in CHANGES:
        operation, notice = CHANGES[change]
        await page.call(operation, IdentityKey(name=name))
        return see(f"/devices/{name}", notice)
    form = await page.form()
    edit, notice = (_move, "moved") if change == "group" else (_tag, "tagged")
    _, problem = await result_of(edit(page, name, form))
    if problem:
        return await _show_device(page, name, form, problem)
    return see(f"/devices/{name}", notice)


async def _move(page: Page, name: str, form: Mapping[str, str]) -> None:
    group = form.get("group", "").strip() or None
    await page.call(MOVE_DEVICE, GroupChange(device=name, group=group))


async def _tag(page: Page, name: str, form: Mapping[str, str]) -> None:
    """Make the changes from the tags that the page showed to those that were entered."""
    shown = parse_tags(form.get("shown", "").split())
    wanted = parse_tags(form.get("tags", "").split())
    tags = {key: value for key, value in wanted.items() if shown.get(key) != value}
    removed = tuple(key for key in shown if key not in wanted)
    if tags or removed:
        await page.call(TAG_DEVICE, TagChange(device=name, tags=tags, remove=removed))
