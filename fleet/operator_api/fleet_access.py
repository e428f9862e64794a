"""Access to a fleet: in this process, or through the API of its server."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from fleet.operator_api.operation import Operation, Request, Response


class FleetAccess(ABC):
    """Access with the rights of one operator.

    A list is read in pages of at most `max_page` rows.
    """

    max_page: ClassVar[int] = 10_000

    @abstractmethod
    def call(self, operation: Operation[Request, Response], request: Request) -> Response:
        """Return the response of an operation.

        Raises:
            FleetError: as the operation; the same class in this process and through the API.
        """
