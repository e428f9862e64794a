"""The parts of a fleet that operations use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from fleet.operator_api.operation import Operation
from fleet.registry.store import Registry
from fleet.server.home import FleetHome


@dataclass(frozen=True)
class OperationContext:
    """The registry, whose actor is the operator, and the folder of the fleet."""

    registry: Registry
    home: FleetHome

    def acting_as(self, actor: str) -> OperationContext:
        """Return the same fleet for the changes of another operator."""
        return replace(self, registry=self.registry.acting_as(actor))


Handlers: TypeAlias = dict[Operation[Any, Any], Callable[[OperationContext, Any], Any]]
"""The functions that run operations."""
