"""Operations on devices."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

from fleet.operator_api.operation import Operation, OperatorRole
from fleet.registry.results import DeviceRow

MAX_PAGE: Final = 1000

PageSize = Annotated[int, Meta(ge=1, le=MAX_PAGE)]


class DeviceQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The devices of one page.

    `search` is a part of the name, `tag` has the form ``key=value``. `after` is the `next_page` of
    the page before. A `sort` with a minus sign begins with the largest value.
    """

    search: str | None = None
    group: str | None = None
    tag: str | None = None
    state: str | None = None
    online: bool | None = None
    sort: Literal["name", "-last_seen", "last_seen"] = "name"
    after: str | None = None
    limit: PageSize = 100


class DeviceList(Struct, frozen=True, kw_only=True):
    """A page of devices; `total` counts all that match the query."""

    devices: list[DeviceRow]
    total: int
    next_page: str | None


LIST_DEVICES: Final = Operation(
    method="GET",
    path="/devices",
    role=OperatorRole.VIEWER,
    request=DeviceQuery,
    response=DeviceList,
    summary="List the devices: online or not, bundle, last seen.",
)
