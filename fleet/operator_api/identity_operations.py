"""Operations on identities and their enrolment tokens."""

from __future__ import annotations

import shlex
from typing import Annotated, Final

from msgspec import Meta, Struct

from fleet.identity.enrolment import Enrolment
from fleet.operator_api.operation import NoFields, Operation, OperatorRole
from fleet.operator_api.paging import ListPage, PageQuery
from fleet.protocol.access import Role
from fleet.protocol.enrolment_api import EnrolmentToken
from fleet.protocol.types import DAY_S
from fleet.registry.results import IdentityRow, NewToken, TokenRow

MAX_TTL_S: Final = 30 * DAY_S
DEFAULT_TTL_S: Final = 900.0
MAX_ENROLMENTS: Final = 10_000

TokenLife = Annotated[float, Meta(ge=1, le=MAX_TTL_S)]


class IdentityQuery(PageQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The identities of one page."""

    role: Role | None = None
    group: str | None = None
    state: str | None = None


class IdentityList(ListPage, frozen=True, kw_only=True):
    """A page of identities, by name."""

    identities: list[IdentityRow]


class IdentityKey(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An identity by its name."""

    name: str


class EnrolmentOrder(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Names to enrol, all or none, each with a token of `ttl_s` seconds.

    With `replace` an identity is replaced, and its certificates are revoked.
    """

    enrolments: Annotated[tuple[Enrolment, ...], Meta(min_length=1, max_length=MAX_ENROLMENTS)]
    ttl_s: TokenLife = DEFAULT_TTL_S
    replace: bool = False


class Invitation(Struct, frozen=True, kw_only=True):
    """A token, which is shown once.

    `command` is to be run on the device; `expires_at` is in seconds since 1970.
    """

    name: str
    role: str
    token: str
    expires_at: float
    command: str

    @classmethod
    def of(
        cls, name: str, role: str, new_token: NewToken, *, ca_sha256: str, server: str
    ) -> Invitation:
        """Return a token of the fleet whose CA certificate and service these are."""
        token = str(EnrolmentToken(ca_sha256, new_token.id, new_token.secret))
        return cls(
            name=name,
            role=role,
            token=token,
            expires_at=new_token.expires_at,
            command=shlex.join(["edge-agent", "join", token, "--server", server, "--out", name]),
        )


class InvitationList(Struct, frozen=True, kw_only=True):
    """Tokens in the order of the names."""

    invitations: list[Invitation]


class InvitationOrder(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An identity that gets another token, of `ttl_s` seconds."""

    name: str
    ttl_s: TokenLife = DEFAULT_TTL_S


class DeletedIdentity(Struct, frozen=True, kw_only=True):
    """The name of a deleted identity, and its state."""

    name: str
    state: str


class TargetChange(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An app, and devices, groups or tags ``key=value``."""

    name: str
    targets: Annotated[tuple[str, ...], Meta(min_length=1)]


class TokenList(Struct, frozen=True, kw_only=True):
    """The enrolment tokens that can be used, by their end."""

    tokens: list[TokenRow]


LIST_IDENTITIES: Final = Operation(
    method="GET",
    path="/identities",
    role=OperatorRole.VIEWER,
    request=IdentityQuery,
    response=IdentityList,
    summary="List the identities: role, state, group, tags, rights, end of the certificate.",
)
SHOW_IDENTITY: Final = Operation(
    method="GET",
    path="/identities/{name}",
    role=OperatorRole.VIEWER,
    request=IdentityKey,
    response=IdentityRow,
    summary="Show one identity.",
)
ENROLL: Final = Operation(
    method="POST",
    path="/identities",
    role=OperatorRole.ADMIN,
    request=EnrolmentOrder,
    response=InvitationList,
    summary="Enrol names, and return a token for each.",
)
INVITE: Final = Operation(
    method="POST",
    path="/identities/{name}/invite",
    role=OperatorRole.ADMIN,
    request=InvitationOrder,
    response=Invitation,
    summary="Return another token for an identity, which keeps its group, tags and rights.",
)
SUSPEND: Final = Operation(
    method="POST",
    path="/identities/{name}/suspend",
    role=OperatorRole.ADMIN,
    request=IdentityKey,
    response=IdentityRow,
    summary="Withdraw an identity's rights until it is resumed.",
)
RESUME: Final = Operation(
    method="POST",
    path="/identities/{name}/resume",
    role=OperatorRole.ADMIN,
    request=IdentityKey,
    response=IdentityRow,
    summary="Restore the rights of a suspended identity.",
)
REVOKE: Final = Operation(
    method="POST",
    path="/identities/{name}/revoke",
    role=OperatorRole.ADMIN,
    request=IdentityKey,
    response=IdentityRow,
    summary="Withdraw an identity's rights for good, and revoke its certificates.",
)
DELETE_IDENTITY: Final = Operation(
    method="DELETE",
    path="/identities/{name}",
    role=OperatorRole.ADMIN,
    request=IdentityKey,
    response=DeletedIdentity,
    summary="Delete an identity that is revoked or has never joined; its statistics stay.",
)
ALLOW: Final = Operation(
    method="POST",
    path="/identities/{name}/allow",
    role=OperatorRole.ADMIN,
    request=TargetChange,
    response=IdentityRow,
    summary="Let an app prompt devices, and devices act on its events, from now on.",
)
DISALLOW: Final = Operation(
    method="POST",
    path="/identities/{name}/disallow",
    role=OperatorRole.ADMIN,
    request=TargetChange,
    response=IdentityRow,
    summary="Withdraw devices, groups or tags that an app was allowed.",
)
LIST_TOKENS: Final = Operation(
    method="GET",
    path="/enrolment-tokens",
    role=OperatorRole.VIEWER,
    request=NoFields,
    response=TokenList,
    summary="List the enrolment tokens that can be used, without their secrets.",
)
