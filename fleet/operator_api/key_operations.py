"""Operations on the keys with which apps use the HTTP API."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta, Struct

from fleet.operator_api.operation import Operation, OperatorRole
from fleet.protocol.types import DAY_S
from fleet.registry.results import ApiKeyRow

MAX_LIFE_S: Final = 3650 * DAY_S


class KeyQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys of one app, or of all."""

    app: str | None = None


class KeyList(Struct, frozen=True, kw_only=True):
    """Keys by app and then by age, also those that are revoked or expired."""

    keys: list[ApiKeyRow]


class KeyOrder(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An app that gets a key, and may prompt the devices, groups or tags `allow` from now on.

    `life_s` is in seconds; a key without it is valid until it is revoked.
    """

    app: str
    allow: tuple[str, ...] = ()
    life_s: Annotated[float, Meta(ge=1, le=MAX_LIFE_S)] | None = None


class CreatedKey(Struct, frozen=True, kw_only=True):
    """A new key; `key` is shown once and not stored. `expires_at` is in seconds since 1970."""

    id: str
    app: str
    key: str
    expires_at: float | None


class KeyName(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key by its id."""

    key_id: str


class RevokedKey(Struct, frozen=True, kw_only=True):
    """A revoked key and its app."""

    id: str
    app: str
    state: str


LIST_KEYS: Final = Operation(
    method="GET",
    path="/keys",
    role=OperatorRole.VIEWER,
    request=KeyQuery,
    response=KeyList,
    summary="List the keys of apps, without their secrets.",
)
CREATE_KEY: Final = Operation(
    method="POST",
    path="/keys",
    role=OperatorRole.ADMIN,
    request=KeyOrder,
    response=CreatedKey,
    summary="Create a key for an app, and return it once; with `allow` the app may be a new name.",
)
REVOKE_KEY: Final = Operation(
    method="DELETE",
    path="/keys/{key_id}",
    role=OperatorRole.ADMIN,
    request=KeyName,
    response=RevokedKey,
    summary="Revoke a key for good; answers that it asked for end within seconds.",
)
