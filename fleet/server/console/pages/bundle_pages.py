"""The bundles: their answers, their names, and their removal."""

from __future__ import annotations

from aiohttp import web

from fleet.operator_api.bundle_operations import (
    LIST_BUNDLES,
    REMOVE_BUNDLE,
    RENAME_BUNDLE,
    BundleNaming,
    BundleRemoval,
)
from fleet.operator_api.operation import NoFields
from fleet.operator_api.stats_operations import LIST_BUNDLE_STATS, StatsWindow
from fleet.server.console.pages.page import Page, result_of, see

PATH = "/bundles"


async def bundles_page(page: Page) -> web.StreamResponse:
    """Show the bundles, and the answers of each."""
    return await _show(page)


async def change_bundle_form(page: Page) -> web.StreamResponse:
    """Give a bundle another name, or remove it."""
    bundle = page.request.match_info["bundle"]
    form = await page.form()
    if page.request.match_info["change"] == "remove":
        removal = BundleRemoval(bundle=bundle, force="force" in form)
        _, problem = await result_of(page.call(REMOVE_BUNDLE, removal))
        notice = "removed"
    else:
        naming = BundleNaming(bundle=bundle, name=form.get("name", "").strip())
        _, problem = await result_of(page.call(RENAME_BUNDLE, naming))
        notice = "named"
    return await _show(page, problem) if problem else see(PATH, notice)


async def _show(page: Page, problem: str = "") -> web.Response:
    bundles = await page.call(LIST_BUNDLES, NoFields())
    stats = await page.call(LIST_BUNDLE_STATS, StatsWindow(limit=1000))
    by_bundle = {row.bundle_id: row for row in stats.rows}
    return page.show(
        "bundles.html",
        400 if problem else 200,
        bundles=bundles.bundles,
        stats=by_bundle,
        problem=problem,
    )
