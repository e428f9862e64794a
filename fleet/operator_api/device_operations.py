"""Operations on devices."""

from __future__ import annotations

from typing import Final, Literal

import msgspec
from msgspec import Struct

from fleet.errors import ConfigError
from fleet.operator_api.operation import Operation, OperatorRole
from fleet.operator_api.paging import ListPage, PageQuery
from fleet.protocol.desired_config import DesiredConfig
from fleet.protocol.types import Timestamp
from fleet.registry.results import DeviceRow, SessionRow, StatsRow


class DeviceQuery(PageQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The devices of one page.

    `search` is a part of the name, `tag` has the form ``key=value``. A `sort` with a minus
    sign begins with the largest value. With `since`, in seconds since 1970, the page also has the
    counts of its devices from then on.
    """

    search: str | None = None
    group: str | None = None
    tag: str | None = None
    state: str | None = None
    online: bool | None = None
    sort: Literal["name", "-last_seen", "last_seen"] = "name"
    since: Timestamp | None = None


class DeviceList(ListPage, frozen=True, kw_only=True):
    """A page of devices; `total` counts all that match the query.

    `stats` are the counts of the page's devices, by name, if the query has a `since`.
    """

    devices: list[DeviceRow]
    total: int
    stats: list[StatsRow] = []


class DeviceWindow(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A device, and the time from which on its answers count, in seconds since 1970."""

    device: str
    since: Timestamp | None = None


class DeviceDetails(Struct, frozen=True, kw_only=True):
    """A device, its counts, its latest sessions, and its desired configuration."""

    device: DeviceRow
    stats: StatsRow
    sessions: list[SessionRow]
    desired: DesiredConfig


class GroupChange(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The group of a device from now on; None is no group."""

    device: str
    group: str | None


class TagChange(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tags of a device to set, and the keys of tags to remove."""

    device: str
    tags: dict[str, str] = msgspec.field(default_factory=dict)
    remove: tuple[str, ...] = ()

    def check(self) -> None:
        """Check that there is something to do, and each tag once. Raises ConfigError."""
        if not self.tags and not self.remove:
            raise ConfigError("nothing to do: give tags like floor=1, or --remove floor")
        both = ", ".join(key for key in self.tags if key in self.remove)
        if both:
            raise ConfigError(f"{both} is to be set and to be removed; give each tag once")


LIST_DEVICES: Final = Operation(
    method="GET",
    path="/devices",
    role=OperatorRole.VIEWER,
    request=DeviceQuery,
    response=DeviceList,
    summary="List the devices: online or not, bundle, last seen.",
)
SHOW_DEVICE: Final = Operation(
    method="GET",
    path="/devices/{device}",
    role=OperatorRole.VIEWER,
    request=DeviceWindow,
    response=DeviceDetails,
    summary="Show one device: its last status, counts, latest sessions, desired settings.",
)
MOVE_DEVICE: Final = Operation(
    method="PUT",
    path="/devices/{device}/group",
    role=OperatorRole.ADMIN,
    request=GroupChange,
    response=DeviceRow,
    summary="Change the group of a device: its settings and the apps that may prompt it follow.",
)
TAG_DEVICE: Final = Operation(
    method="PATCH",
    path="/devices/{device}/tags",
    role=OperatorRole.ADMIN,
    request=TagChange,
    response=DeviceRow,
    summary="Set or remove tags of a device; apps may be allowed all devices of a tag.",
)
