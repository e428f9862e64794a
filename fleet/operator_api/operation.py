"""An operation of an operator: its path, its role, and the types of its request and response."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Final, Generic, Literal, NamedTuple, TypeVar

from msgspec import Struct

PREFIX: Final = "/v1/fleet"
PATH_FIELD: Final = re.compile(r"\{(\w+)\}")

Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
Request = TypeVar("Request", bound=Struct)
Response = TypeVar("Response", bound=Struct)


class OperatorRole(enum.StrEnum):
    """The rights of an operator; each role has those of the roles before it."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"

    def includes(self, role: OperatorRole) -> bool:
        """Whether this role has the rights of `role`."""
        roles = list(OperatorRole)
        return roles.index(self) >= roles.index(role)


class SignedInOperator(NamedTuple):
    """An operator whose request was authenticated. The audit log has the name as the actor."""

    name: str
    role: OperatorRole


class NoFields(Struct, frozen=True, forbid_unknown_fields=True):
    """A request or a response without fields."""


@dataclass(frozen=True, kw_only=True)
class Operation(Generic[Request, Response]):
    """One operation, which the HTTP API, the console and the command line share.

    `path` follows `PREFIX`; its fields in braces are fields of the request. The other fields are
    the query of a GET or a DELETE, and the JSON body of another method.
    """

    method: Method
    path: str
    role: OperatorRole
    request: type[Request]
    response: type[Response]
    summary: str

    @property
    def path_fields(self) -> frozenset[str]:
        """The fields of the request that the path has."""
        return frozenset(PATH_FIELD.findall(self.path))

    @property
    def has_body(self) -> bool:
        return self.method not in ("GET", "DELETE")

    @property
    def is_change(self) -> bool:
        """Whether it changes something."""
        return self.method != "GET"
