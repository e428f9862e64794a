"""Operations on devices."""

from __future__ import annotations

from typing import Final

from fleet.identity.enrolment import Enrolment, format_tags
from fleet.operator_api.device_operations import (
    LIST_DEVICES,
    MOVE_DEVICE,
    SHOW_DEVICE,
    TAG_DEVICE,
    DeviceDetails,
    DeviceList,
    DeviceQuery,
    DeviceWindow,
    GroupChange,
    TagChange,
)
from fleet.registry.results import DeviceRow
from fleet.server.operations.context import Handlers, OperationContext
from fleet.server.operations.pages import page_of

NUM_SESSIONS: Final = 5


def _list_devices(context: OperationContext, query: DeviceQuery) -> DeviceList:
    """Return a page of devices."""
    rows = [row for row in context.registry.stats.devices() if _matches(row, query)]
    if query.sort != "name":
        rows.sort(key=lambda row: row.last_seen or 0.0, reverse=query.sort.startswith("-"))
    devices, next_page = page_of(rows, query, lambda row: row.device)
    return DeviceList(devices=devices, total=len(rows), next_page=next_page)


def _matches(row: DeviceRow, query: DeviceQuery) -> bool:
    return (
        (query.search is None or query.search in row.device)
        and (query.group is None or row.group == query.group)
        and (query.tag is None or query.tag in format_tags(row.tags))
        and (query.state is None or row.state == query.state)
        and (query.online is None or row.online == query.online)
    )


def _show_device(context: OperationContext, window: DeviceWindow) -> DeviceDetails:
    """Return one device. Raises UnknownDeviceError."""
    registry = context.registry
    (counts,) = registry.stats.per_device(window.device, window.since)
    return DeviceDetails(
        device=registry.stats.device(window.device),
        stats=counts,
        sessions=registry.stats.sessions(window.device, NUM_SESSIONS),
        desired=registry.desired_state.configs([window.device])[window.device],
    )


def _move_device(context: OperationContext, change: GroupChange) -> DeviceRow:
    """Change the group of a device. Raises UnknownDeviceError, IdentityError or TopicError."""
    Enrolment(name=change.device, group=change.group).check()
    context.registry.identities.move(change.device, change.group)
    return context.registry.stats.device(change.device)


def _tag_device(context: OperationContext, change: TagChange) -> DeviceRow:
    """Set and remove tags of a device.

    Raises:
        ConfigError: there is nothing to do, or a tag is to be set and to be removed.
        UnknownDeviceError, IdentityError, TopicError: as `IdentityRepository.tag`.
    """
    change.check()
    Enrolment(name=change.device, tags=change.tags).check()
    context.registry.identities.tag(change.device, change.tags, change.remove)
    return context.registry.stats.device(change.device)


DEVICE_HANDLERS: Final[Handlers] = {
    LIST_DEVICES: _list_devices,
    SHOW_DEVICE: _show_device,
    MOVE_DEVICE: _move_device,
    TAG_DEVICE: _tag_device,
}
