"""Operations on operators and their keys."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta, Struct

from fleet.operator_api.operation import NoFields, Operation, OperatorRole
from fleet.protocol.types import DAY_S
from fleet.registry.results import OperatorKeyRow, OperatorRow

MAX_KEY_S: Final = 3650 * DAY_S


class OperatorList(Struct, frozen=True, kw_only=True):
    """All operators, by name."""

    operators: list[OperatorRow]


class OperatorName(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An operator by its name."""

    name: str


class NewOperator(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An operator and its role, which is to be added or changed."""

    name: str
    role: OperatorRole


class OperatorLink(Struct, frozen=True, kw_only=True):
    """A link that signs an operator in once.

    It is shown once and not stored. Without a console it is the path alone. `expires_at` is in
    seconds since 1970.
    """

    name: str
    link: str
    expires_at: float


class ChangedRole(Struct, frozen=True, kw_only=True):
    """An operator and its new role."""

    name: str
    role: OperatorRole


class RemovedOperator(Struct, frozen=True, kw_only=True):
    """The name of an operator that was removed."""

    name: str


class OperatorKeyQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys of one operator, or of all."""

    operator: str | None = None


class OperatorKeyList(Struct, frozen=True, kw_only=True):
    """Keys of operators, by operator and age."""

    keys: list[OperatorKeyRow]


class OperatorKeyOrder(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An operator that gets a key, for `life_s` seconds or until it is revoked."""

    name: str
    life_s: Annotated[float, Meta(ge=1, le=MAX_KEY_S)] | None = None


class CreatedOperatorKey(Struct, frozen=True, kw_only=True):
    """A new key; `key` is shown once and not stored. `expires_at` is in seconds since 1970."""

    id: str
    operator: str
    key: str
    expires_at: float | None


class OperatorKeyName(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key by its id."""

    key_id: str


class RevokedOperatorKey(Struct, frozen=True, kw_only=True):
    """A key that was revoked, and its operator."""

    id: str
    operator: str


LIST_OPERATORS: Final = Operation(
    method="GET",
    path="/operators",
    role=OperatorRole.ADMIN,
    request=NoFields,
    response=OperatorList,
    summary="List the operators: role, open sessions, keys, last seen.",
)
ADD_OPERATOR: Final = Operation(
    method="POST",
    path="/operators",
    role=OperatorRole.ADMIN,
    request=NewOperator,
    response=OperatorLink,
    summary="Add an operator; return a link that signs in once.",
)
SET_OPERATOR_ROLE: Final = Operation(
    method="PUT",
    path="/operators/{name}/role",
    role=OperatorRole.ADMIN,
    request=NewOperator,
    response=ChangedRole,
    summary="Change the role of an operator, also for open sessions and keys.",
)
REMOVE_OPERATOR: Final = Operation(
    method="DELETE",
    path="/operators/{name}",
    role=OperatorRole.ADMIN,
    request=OperatorName,
    response=RemovedOperator,
    summary="Remove an operator with all sessions and keys.",
)
MAKE_OPERATOR_LINK: Final = Operation(
    method="POST",
    path="/operators/{name}/links",
    role=OperatorRole.ADMIN,
    request=OperatorName,
    response=OperatorLink,
    summary="Make a link that signs an operator in once.",
)
LIST_OPERATOR_KEYS: Final = Operation(
    method="GET",
    path="/operator-keys",
    role=OperatorRole.ADMIN,
    request=OperatorKeyQuery,
    response=OperatorKeyList,
    summary="List the keys of operators, without their secrets.",
)
CREATE_OPERATOR_KEY: Final = Operation(
    method="POST",
    path="/operators/{name}/keys",
    role=OperatorRole.ADMIN,
    request=OperatorKeyOrder,
    response=CreatedOperatorKey,
    summary="Create a key for the scripts of an operator, and return it once.",
)
REVOKE_OPERATOR_KEY: Final = Operation(
    method="DELETE",
    path="/operator-keys/{key_id}",
    role=OperatorRole.ADMIN,
    request=OperatorKeyName,
    response=RevokedOperatorKey,
    summary="Revoke a key of an operator for good.",
)
