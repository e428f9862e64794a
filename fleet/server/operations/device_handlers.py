"""Operations on devices."""

from __future__ import annotations

from typing import Final

from fleet.identity.enrolment import Enrolment
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
from fleet.registry.results import DeviceRow, StatsRow
from fleet.registry.stats.device_pages import DeviceFilter
from fleet.server.operations.context import Handlers, OperationContext

NUM_SESSIONS: Final = 5


def _list_devices(context: OperationContext, query: DeviceQuery) -> DeviceList:
    """Return a page of devices."""
    stats = context.registry.stats
    wanted = DeviceFilter(
        search=query.search,
        group=query.group,
        tag=query.tag,
        state=query.state,
        online=query.online,
        newest_first=None if query.sort == "name" else query.sort.startswith("-"),
    )
    devices, page = stats.device_page(wanted, query.after, query.limit)
    counts: list[StatsRow] = []
    if query.since is not None and page.names:
        counts = stats.per_device(since=query.since, devices=page.names)
    next_page = page.names[-1] if page.has_more else None
    return DeviceList(devices=devices, total=page.total, stats=counts, next_page=next_page)


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
