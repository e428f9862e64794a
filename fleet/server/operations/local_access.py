"""Access to a fleet whose registry this process has open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from fleet.operator_api.device_operations import LIST_DEVICES
from fleet.operator_api.fleet_access import FleetAccess
from fleet.operator_api.operation import Operation, Request, Response
from fleet.server.operations.context import OperationContext
from fleet.server.operations.device_handlers import list_devices

HANDLERS: Final[dict[Operation[Any, Any], Callable[[OperationContext, Any], Any]]] = {
    LIST_DEVICES: list_devices,
}


@dataclass(frozen=True)
class LocalAccess(FleetAccess):
    """Access through the registry; changes are those of its actor. Any thread may use it."""

    context: OperationContext

    def call(self, operation: Operation[Request, Response], request: Request) -> Response:
        response: Response = HANDLERS[operation](self.context, request)
        return response
