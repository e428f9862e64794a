"""Roll-outs: the list, one of them, and the start of a new one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec
from aiohttp import web

from fleet.errors import RolloutError
from fleet.operator_api.bundle_operations import (
    LIST_BUNDLES,
    LIST_ROLLOUTS,
    PAUSE_ROLLOUT,
    RESUME_ROLLOUT,
    ROLL_BACK,
    SHOW_ROLLOUT,
    START_ROLLOUT,
    RolloutChoice,
    RolloutKey,
    RolloutQuery,
    RolloutStart,
    RolloutUndoing,
)
from fleet.operator_api.operation import NoFields
from fleet.registry.results import RolloutRow
from fleet.registry.rollouts.canary_analysis import CanaryLimits
from fleet.registry.rollouts.plan import RolloutPlan
from fleet.registry.rollouts.states import RolloutState
from fleet.server.console.api_routes import check_role
from fleet.server.console.pages.page import Page, result_of, see
from fleet.utils.validation import describe_error

PAGE_ROWS: Final = 50
STAGES: Final = "percentages"
DETAILS: Final = {
    "observe_s": "Least time of observation for each stage, in seconds",
    "take_within_s": "Longest time to install the bundle, in seconds",
    "offline_after_s": "A device fails after it is offline for this many seconds",
    "max_failed": "Largest share of devices that fail",
    "agreement_sample": "Share of answers whose tokens the cloud verifies meanwhile",
    "max_offload_increase": "Largest increase of the offload, as a share of tokens",
    "max_agreement_drop": "Largest drop of the agreement, as a share of verified tokens",
    "max_error_rate": "Largest share of answers that end with an error",
    "max_tpot_ratio": "Largest time per token, relative to the previous bundle",
    "min_answers": "Least number of answers before the limits are evaluated",
}
"""The labels of the limits and times of a plan."""


async def rollouts_page(page: Page) -> web.StreamResponse:
    """Show the roll-outs, the newest first."""
    query = RolloutQuery(after=page.query("after"), limit=PAGE_ROWS)
    found = await page.call(LIST_ROLLOUTS, query)
    return page.show(
        "rollouts.html",
        rollouts=found.rollouts,
        next_address=found.next_page and page.address(after=found.next_page),
    )


async def rollout_page(page: Page) -> web.StreamResponse:
    """Show one roll-out."""
    row = await page.call(SHOW_ROLLOUT, RolloutKey(rollout=_rollout_id(page)))
    return page.show("rollout.html", rollout=row)


async def change_rollout_form(page: Page) -> web.StreamResponse:
    """Pause, resume or roll back a roll-out."""
    rollout = _rollout_id(page)
    match page.request.match_info["change"]:
        case "pause":
            await page.call(PAUSE_ROLLOUT, RolloutChoice(rollout=rollout))
            return see(f"/rollouts/{rollout}", "paused")
        case "resume":
            await page.call(RESUME_ROLLOUT, RolloutChoice(rollout=rollout))
            return see(f"/rollouts/{rollout}", "resumed")
    at_once = "at_once" in await page.form()
    row = await page.call(ROLL_BACK, RolloutUndoing(rollout=rollout, at_once=at_once))
    notice = "rolled-back" if row.state == RolloutState.UNDONE else "way-back"
    return see(f"/rollouts/{row.id}", notice)


async def new_rollout_page(page: Page) -> web.StreamResponse:
    """Show the form of a new roll-out."""
    check_role(page.operator, START_ROLLOUT)
    return await _show_form(page, {"bundle": page.query("bundle") or ""})


async def start_rollout_form(page: Page) -> web.StreamResponse:
    """Start a roll-out."""
    form = await page.form()
    row, problem = await result_of(_start(page, form))
    if row is None:
        return await _show_form(page, form, problem)
    return see(f"/rollouts/{row.id}", "started")


async def _start(page: Page, form: Mapping[str, str]) -> RolloutRow:
    start = RolloutStart(bundle=form.get("bundle", ""), plan=plan_of(form))
    return await page.call(START_ROLLOUT, start)


async def _show_form(page: Page, entered: Mapping[str, str], problem: str = "") -> web.Response:
    found = await page.call(LIST_BUNDLES, NoFields())
    return page.show(
        "new_rollout.html",
        400 if problem else 200,
        bundles=found.bundles,
        details=DETAILS,
        values=_default_texts() | dict(entered),
        problem=problem,
    )


def _default_texts() -> dict[str, str]:
    """Return the plan's defaults as the texts of the form."""
    plan = msgspec.to_builtins(RolloutPlan())
    stages = ", ".join(map(str, plan.pop(STAGES)))
    values = plan | plan.pop("limits") | {STAGES: stages}
    return {name: "" if value is None else str(value) for name, value in values.items()}


def plan_of(form: Mapping[str, str]) -> RolloutPlan:
    """Return the plan of a form; an empty field has its default.

    Raises:
        RolloutError: a field is not usable.
    """
    texts = {name: text.strip() for name, text in form.items() if text.strip()}
    names = {*RolloutPlan.__struct_fields__} - {"at_once", "limits"}
    values: dict[str, Any] = {name: text for name, text in texts.items() if name in names}
    limits = {name: texts[name] for name in CanaryLimits.__struct_fields__ if name in texts}
    if STAGES in values:
        values[STAGES] = [each.strip() for each in values[STAGES].split(",")]
    try:
        return msgspec.convert(values | {"limits": limits}, RolloutPlan, strict=False)
    except msgspec.ValidationError as error:
        reason = describe_error(error, RolloutPlan)
        raise RolloutError(f"the plan is not usable: {reason}; correct the field") from None


def _rollout_id(page: Page) -> int:
    return int(page.request.match_info["rollout"])
