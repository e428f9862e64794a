"""Pages of devices: filtered, sorted and counted by the database."""

from __future__ import annotations

from typing import Any, NamedTuple

from msgspec import Struct
from sqlalchemy import ColumnElement, Select, and_, exists, func, not_, or_, select
from sqlalchemy.orm import Session

from fleet.registry.identities.devices import is_device, is_online
from fleet.registry.identities.lifecycle import LIMITED_BY_CERTIFICATE, IdentityState
from fleet.registry.models import IdentityRecord, StatusRecord, TagRecord


class DeviceFilter(Struct, frozen=True, kw_only=True):
    """The devices of a list, and their order.

    `search` is a part of the name, `tag` has the form ``key=value``, `state` is an `IdentityState`.
    Without `newest_first` the devices are sorted by name; else by the time at which they were last
    seen, those that never were as the oldest.
    """

    search: str | None = None
    group: str | None = None
    tag: str | None = None
    state: str | None = None
    online: bool | None = None
    newest_first: bool | None = None


class DevicePage(NamedTuple):
    """The names of a page of devices, and the number of all that match."""

    names: list[str]
    total: int
    has_more: bool


def page_of_devices(
    db: Session, wanted: DeviceFilter, after: str | None, limit: int, now: float
) -> DevicePage:
    """Return at most `limit` devices that follow the device `after` in the order of the list."""
    found = _matching(select(IdentityRecord.name), wanted, now)
    total = db.scalar(select(func.count()).select_from(found.subquery())) or 0
    if after is not None:
        found = found.where(_follows(db, wanted.newest_first, after))
    names = db.scalars(found.order_by(*_order(wanted.newest_first)).limit(limit + 1)).all()
    return DevicePage(list(names[:limit]), total, len(names) > limit)


def _matching(query: Select[Any], wanted: DeviceFilter, now: float) -> Select[Any]:
    name = IdentityRecord.name
    query = query.outerjoin(StatusRecord, StatusRecord.device == name).where(is_device())
    if wanted.search is not None:
        query = query.where(name.contains(wanted.search.lower(), autoescape=True))
    if wanted.group is not None:
        query = query.where(IdentityRecord.group == wanted.group)
    if wanted.tag is not None:
        key, _, value = wanted.tag.partition("=")
        is_tag = and_(TagRecord.device == name, TagRecord.key == key, TagRecord.value == value)
        query = query.where(exists().where(is_tag))
    if wanted.state is not None:
        query = query.where(_is_in_state(wanted.state, now))
    if wanted.online is not None:
        is_off = or_(StatusRecord.device.is_(None), not_(is_online()))
        query = query.where(is_online() if wanted.online else is_off)
    return query


def _is_in_state(state: str, now: float) -> ColumnElement[bool]:
    """Condition: the state at `now`, as `state_at` has it."""
    has_ended = and_(
        IdentityRecord.state.in_(LIMITED_BY_CERTIFICATE), IdentityRecord.not_after <= now
    )
    if state == IdentityState.EXPIRED:
        return or_(IdentityRecord.state == state, has_ended)
    return and_(IdentityRecord.state == state, not_(has_ended))


def _last_seen() -> ColumnElement[float]:
    return func.coalesce(StatusRecord.last_seen, 0.0)


def _order(newest_first: bool | None) -> tuple[ColumnElement[Any], ...]:
    name = IdentityRecord.name.asc()
    if newest_first is None:
        return (name,)
    return (_last_seen().desc() if newest_first else _last_seen().asc(), name)


def _follows(db: Session, newest_first: bool | None, after: str) -> ColumnElement[bool]:
    """Condition: the device is behind `after` in the order, also if `after` was deleted."""
    is_behind = IdentityRecord.name > after
    if newest_first is None:
        return is_behind
    seen = db.scalar(select(StatusRecord.last_seen).where(StatusRecord.device == after)) or 0.0
    is_later = _last_seen() < seen if newest_first else _last_seen() > seen
    return or_(is_later, and_(_last_seen() == seen, is_behind))
