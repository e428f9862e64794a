"""Access to a fleet whose registry this process has open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fleet.operator_api.fleet_access import FleetAccess
from fleet.operator_api.operation import Operation, Request, Response
from fleet.server.operations.alarm_handlers import ALARM_HANDLERS
from fleet.server.operations.audit_handlers import AUDIT_HANDLERS
from fleet.server.operations.bundle_handlers import BUNDLE_HANDLERS
from fleet.server.operations.context import Handlers, OperationContext
from fleet.server.operations.device_handlers import DEVICE_HANDLERS
from fleet.server.operations.identity_handlers import IDENTITY_HANDLERS
from fleet.server.operations.operator_handlers import OPERATOR_HANDLERS
from fleet.server.operations.settings_handlers import SETTINGS_HANDLERS
from fleet.server.operations.software_handlers import SOFTWARE_HANDLERS
from fleet.server.operations.stats_handlers import STATS_HANDLERS

HANDLERS: Final[Handlers] = {
    **DEVICE_HANDLERS,
    **STATS_HANDLERS,
    **BUNDLE_HANDLERS,
    **SETTINGS_HANDLERS,
    **SOFTWARE_HANDLERS,
    **IDENTITY_HANDLERS,
    **AUDIT_HANDLERS,
    **ALARM_HANDLERS,
    **OPERATOR_HANDLERS,
}


@dataclass(frozen=True)
class LocalAccess(FleetAccess):
    """Access through the registry; changes are those of its actor. Any thread may use it."""

    context: OperationContext

    def call(self, operation: Operation[Request, Response], request: Request) -> Response:
        response: Response = HANDLERS[operation](self.context, request)
        return response
