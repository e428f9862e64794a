"""The desired settings of all devices, of a group or of one device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec
from aiohttp import web

from fleet.errors import ConfigError
from fleet.operator_api.settings_operations import (
    SET_SETTINGS,
    SHOW_SETTINGS,
    UNSET_SETTINGS,
    SettingsChange,
    SettingsRemoval,
    SettingsTarget,
)
from fleet.protocol.desired_config import Settings
from fleet.server.console.pages.page import Page, result_of, see
from fleet.utils.validation import JSON_ERRORS

ALL: Final = "all"


async def settings_page(page: Page) -> web.StreamResponse:
    """Show the settings of a target, each with the scope that decided it."""
    return await _show(page, page.query("target") or ALL)


async def change_settings_form(page: Page) -> web.StreamResponse:
    """Set or remove one setting; the form has the version that its operator saw."""
    form = await page.form()
    target = form.get("target", ALL)
    name = form.get("name", "").strip()
    _, problem = await result_of(_change(page, target, name, form))
    if problem:
        return await _show(page, target, problem, form.get("value", ""), name)
    address = page.request.rel_url.with_query(target=target)
    return see(str(address.with_query(target=target, notice="changed")))


async def _change(page: Page, target: str, name: str, form: Mapping[str, str]) -> None:
    """Set or remove a setting. Raises FleetError."""
    version = _version(form.get("version", ""))
    if "remove" in form:
        removal = SettingsRemoval(target=target, keys=(name,), if_version=version)
        await page.call(UNSET_SETTINGS, removal)
    else:
        settings = {name: _value(form.get("value", ""))}
        change = SettingsChange(target=target, settings=settings, if_version=version)
        await page.call(SET_SETTINGS, change)


async def _show(
    page: Page, target: str, problem: str = "", value: str = "", name: str = ""
) -> web.Response:
    found = await page.call(SHOW_SETTINGS, SettingsTarget(target=target))
    scopes = {scope.target: msgspec.to_builtins(scope.settings) for scope in found.scopes}
    deciding: dict[str, tuple[Any, str]] = {}
    for scope, values in scopes.items():  # the narrowest is the last one
        deciding |= {key: (each, scope) for key, each in values.items() if each is not None}
    own = next((scope for scope in found.scopes if scope.target == found.target), None)
    return page.show(
        "settings.html",
        400 if problem else 200,
        target=found.target,
        version=own.version if own else 0,
        deciding=deciding,
        names=sorted(Settings.__struct_fields__),
        problem=problem,
        value=value,
        name=name,
    )


def _value(text: str) -> Any:
    """Return the value of a field: JSON, or else the text itself."""
    try:
        return msgspec.json.decode(text)
    except JSON_ERRORS:
        return text


def _version(text: str) -> int | None:
    """Return the version that a form has; None if it has none. Raises ConfigError."""
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 16):
        raise ConfigError(f"version {text[:80]!r}: expected a number; open the page again")
    return int(text)
