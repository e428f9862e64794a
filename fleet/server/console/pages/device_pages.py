"""The devices, and one of them."""

from __future__ import annotations

import time
from typing import Final

from aiohttp import web

from fleet.operator_api.device_operations import (
    LIST_DEVICES,
    SHOW_DEVICE,
    DeviceQuery,
    DeviceWindow,
)
from fleet.operator_api.identity_operations import RESUME, REVOKE, SUSPEND, IdentityKey
from fleet.operator_api.settings_operations import SHOW_SETTINGS, SettingsTarget
from fleet.operator_api.stats_operations import LIST_HOUR_STATS, StatsWindow
from fleet.protocol.types import DAY_S
from fleet.server.console.pages.page import Page, see

PAGE_ROWS: Final = 50
SORTS: Final = ("name", "-last_seen", "last_seen")
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
    name = page.request.match_info["device"]
    since = time.time() - DAY_S
    details = await page.call(SHOW_DEVICE, DeviceWindow(device=name, since=since))
    settings = await page.call(SHOW_SETTINGS, SettingsTarget(target=f"device:{name}"))
    hours = await page.call(LIST_HOUR_STATS, StatsWindow(device=name, since=since, limit=48))
    return page.show("device.html", details=details, settings=settings, hours=hours.rows)


async def change_device_form(page: Page) -> web.StreamResponse:
    """Suspend, resume or revoke a device."""
    name = page.request.match_info["device"]
    operation, notice = CHANGES[page.request.match_info["change"]]
    await page.call(operation, IdentityKey(name=name))
    return see(f"/devices/{name}", notice)
