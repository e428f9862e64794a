"""Operations on the software of devices."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from msgspec import Struct

from fleet.operator_api.operation import NoFields, Operation, OperatorRole
from fleet.operator_api.paging import ListPage, PageQuery


class UpdateState(StrEnum):
    """The state of a device's software; `own` is that of a device without a desired version."""

    OWN = "own"
    CURRENT = "current"
    PENDING = "pending"
    FAILED = "failed"


class VersionRow(Struct, frozen=True, kw_only=True):
    """A version that devices run or that the server offers, and its numbers of devices."""

    version: str
    is_kept: bool
    running: int
    desired: int
    failed: int


class VersionList(Struct, frozen=True, kw_only=True):
    """The versions that the server offers, then others that devices run."""

    versions: list[VersionRow]


class UpdateRow(Struct, frozen=True, kw_only=True):
    """The software of one device; `problem` is why it does not run the desired version."""

    device: str
    group: str | None
    online: bool
    version: str
    desired: str | None
    state: UpdateState
    problem: str


class UpdateQuery(PageQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The devices of one page, of a group where it is given."""

    group: str | None = None


class UpdateList(ListPage, frozen=True, kw_only=True):
    """A page of the devices' software, by name."""

    updates: list[UpdateRow]


class VersionRollout(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A version, and its target: ``all``, ``group:NAME`` or ``device:NAME``.

    With `force` also after a failure, or without an earlier stage.
    """

    version: str
    target: str
    force: bool = False


class DesiredVersion(Struct, frozen=True, kw_only=True):
    """The software of a target, and the version of its settings."""

    target: str
    version: int
    software: str


LIST_VERSIONS: Final = Operation(
    method="GET",
    path="/software",
    role=OperatorRole.VIEWER,
    request=NoFields,
    response=VersionList,
    summary="List the versions: those that devices can fetch, and those that devices run.",
)
LIST_UPDATES: Final = Operation(
    method="GET",
    path="/software/updates",
    role=OperatorRole.VIEWER,
    request=UpdateQuery,
    response=UpdateList,
    summary="List each device's running and desired version, and why they differ.",
)
ROLL_OUT_VERSION: Final = Operation(
    method="POST",
    path="/software/{version}/roll-out",
    role=OperatorRole.OPERATOR,
    request=VersionRollout,
    response=DesiredVersion,
    summary="Bring a version to a device, to a group, then to all: each call is one stage.",
)
