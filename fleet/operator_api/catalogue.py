"""All operations, from which the routes, their documentation and the client are made."""

from __future__ import annotations

from typing import Any, Final

from fleet.operator_api.device_operations import LIST_DEVICES
from fleet.operator_api.operation import Operation

OPERATIONS: Final[tuple[Operation[Any, Any], ...]] = (LIST_DEVICES,)
