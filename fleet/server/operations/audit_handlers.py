"""Operations on the audit log, and on the checks of the fleet."""

from __future__ import annotations

from typing import Final

from fleet.operator_api.audit_operations import (
    CHECK_FLEET,
    LIST_CHANGES,
    AuditList,
    AuditQuery,
    CheckList,
)
from fleet.operator_api.operation import NoFields
from fleet.server.fleet_checks import run_checks
from fleet.server.operations.context import Handlers, OperationContext
from fleet.server.operations.pages import next_number, number_of


def _list_changes(context: OperationContext, query: AuditQuery) -> AuditList:
    """Return a page of changes."""
    found = context.registry.audit_log.numbered_entries(
        query.subject,
        query.since,
        query.limit + 1,
        action=query.action,
        before=None if query.after is None else number_of(query.after),
    )
    rows = list(found.values())[: query.limit]
    return AuditList(changes=rows, next_page=next_number(list(found), query.limit))


def _check_fleet(context: OperationContext, _: NoFields) -> CheckList:
    """Run the checks of the fleet, one after the other."""
    return CheckList(checks=tuple(run_checks(context.home)))


AUDIT_HANDLERS: Final[Handlers] = {
    LIST_CHANGES: _list_changes,
    CHECK_FLEET: _check_fleet,
}
