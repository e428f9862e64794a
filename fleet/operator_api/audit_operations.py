"""Operations on the audit log, and on the checks of the fleet."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from fleet.operator_api.operation import NoFields, Operation, OperatorRole
from fleet.operator_api.paging import ListPage, PageQuery
from fleet.protocol.types import Timestamp
from fleet.registry.results import AuditRow


class AuditQuery(PageQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The changes of one page: of a subject or an action, at `since` or later.

    `since` is in seconds since 1970.
    """

    subject: str | None = None
    action: str | None = None
    since: Timestamp | None = None


class AuditList(ListPage, frozen=True, kw_only=True):
    """A page of changes, the newest first."""

    changes: list[AuditRow]


class Check(Struct, frozen=True):
    """A check and its finding; `problem` has the fault and its remedy, "" without one."""

    name: str
    found: str
    problem: str = ""


class CheckList(Struct, frozen=True, kw_only=True):
    """The checks of the fleet, at the machine with its folder."""

    checks: tuple[Check, ...]


LIST_CHANGES: Final = Operation(
    method="GET",
    path="/audit",
    role=OperatorRole.VIEWER,
    request=AuditQuery,
    response=AuditList,
    summary="List the latest changes to the fleet, newest first.",
)
CHECK_FLEET: Final = Operation(
    method="GET",
    path="/checks",
    role=OperatorRole.VIEWER,
    request=NoFields,
    response=CheckList,
    summary="Check the fleet: registry, authority, certificates, broker, bundle, disk.",
)
