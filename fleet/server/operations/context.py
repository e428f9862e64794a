"""The parts of a fleet that operations use."""

from __future__ import annotations

from dataclasses import dataclass

from fleet.registry.store import Registry
from fleet.server.home import FleetHome


@dataclass(frozen=True)
class OperationContext:
    """The registry, whose actor is the operator, and the folder of the fleet."""

    registry: Registry
    home: FleetHome
