"""Operations on identities, their enrolment tokens, and the keys of apps."""

from __future__ import annotations

import time
from typing import Final

from fleet.errors import ConfigError
from fleet.identity.enrolment import Enrolment, check_enrolments
from fleet.operator_api.identity_operations import (
    ALLOW,
    DELETE_IDENTITY,
    DISALLOW,
    ENROLL,
    INVITE,
    LIST_IDENTITIES,
    LIST_TOKENS,
    RESUME,
    REVOKE,
    SHOW_IDENTITY,
    SUSPEND,
    DeletedIdentity,
    EnrolmentOrder,
    IdentityKey,
    IdentityList,
    IdentityQuery,
    Invitation,
    InvitationList,
    InvitationOrder,
    TargetChange,
    TokenList,
)
from fleet.operator_api.key_operations import (
    CREATE_KEY,
    LIST_KEYS,
    REVOKE_KEY,
    CreatedKey,
    KeyList,
    KeyName,
    KeyOrder,
    KeyQuery,
    RevokedKey,
)
from fleet.operator_api.operation import NoFields
from fleet.protocol.access import Role
from fleet.registry.identities.lifecycle import IdentityState
from fleet.registry.results import IdentityRow
from fleet.server.home import FleetHome, check_own_names
from fleet.server.operations.context import Handlers, OperationContext
from fleet.server.operations.pages import page_of


def _list_identities(context: OperationContext, query: IdentityQuery) -> IdentityList:
    """Return a page of identities."""
    rows = [
        row
        for row in context.registry.identities.all(query.role)
        if query.group in (None, row.group) and query.state in (None, row.state)
    ]
    page, next_page = page_of(rows, query, lambda row: row.name)
    return IdentityList(identities=page, next_page=next_page)


def _show_identity(context: OperationContext, key: IdentityKey) -> IdentityRow:
    """Return one identity. Raises UnknownDeviceError."""
    return context.registry.identities.get(key.name)


def _enroll(context: OperationContext, order: EnrolmentOrder) -> InvitationList:
    """Enrol all names or none.

    Raises:
        ConfigError: a field does not fit, or the fleet has no service to join at.
        TopicError: a name is not valid.
        IdentityError: one of them cannot be enrolled.
    """
    check_enrolments(order.enrolments)
    check_own_names(order.enrolments)
    server = _service_address(context.home)
    identities = context.registry.identities
    tokens = identities.enroll(order.enrolments, order.ttl_s, replace=order.replace)
    ca_sha256 = context.home.ca_sha256()
    invitations = [
        Invitation.of(each.name, each.role, token, ca_sha256=ca_sha256, server=server)
        for each, token in zip(order.enrolments, tokens, strict=True)
    ]
    return InvitationList(invitations=invitations)


def _invite(context: OperationContext, order: InvitationOrder) -> Invitation:
    """Make another token for an identity.

    Raises:
        ConfigError: the fleet has no service to join at.
        UnknownDeviceError, StateError: it is not enrolled, or suspended or revoked.
    """
    row = context.registry.identities.get(order.name)
    server = _service_address(context.home)
    token = context.registry.identities.invite(order.name, order.ttl_s)
    ca_sha256 = context.home.ca_sha256()
    return Invitation.of(row.name, row.role, token, ca_sha256=ca_sha256, server=server)


def _service_address(home: FleetHome) -> str:
    """Return the URL at which identities join. Raises ConfigError when the fleet has no service."""
    server = home.address().server
    if server is None:
        raise ConfigError(
            "this fleet has no service to join at; give --out DIR, or start it with --service-port"
        )
    return server


def _suspend(context: OperationContext, key: IdentityKey) -> IdentityRow:
    """Suspend an identity. Raises ConfigError, UnknownDeviceError or StateError."""
    context.home.check_not_own(key.name)
    context.registry.identities.suspend(key.name)
    return context.registry.identities.get(key.name)


def _resume(context: OperationContext, key: IdentityKey) -> IdentityRow:
    """Resume an identity. Raises UnknownDeviceError or StateError."""
    context.registry.identities.resume(key.name)
    return context.registry.identities.get(key.name)


def _revoke(context: OperationContext, key: IdentityKey) -> IdentityRow:
    """Revoke an identity. Raises ConfigError or UnknownDeviceError."""
    context.home.check_not_own(key.name)
    context.registry.identities.revoke(key.name)
    return context.registry.identities.get(key.name)


def _delete_identity(context: OperationContext, key: IdentityKey) -> DeletedIdentity:
    """Delete an identity. Raises UnknownDeviceError or StateError."""
    context.registry.identities.delete(key.name)
    return DeletedIdentity(name=key.name, state=IdentityState.DELETED)


def _allow(context: OperationContext, change: TargetChange) -> IdentityRow:
    """Allow an app more targets. Raises IdentityError."""
    context.registry.identities.allow(change.name, change.targets)
    return context.registry.identities.get(change.name)


def _disallow(context: OperationContext, change: TargetChange) -> IdentityRow:
    """Withdraw targets of an app. Raises IdentityError."""
    context.registry.identities.disallow(change.name, change.targets)
    return context.registry.identities.get(change.name)


def _list_tokens(context: OperationContext, _: NoFields) -> TokenList:
    """Return the enrolment tokens that can be used."""
    return TokenList(tokens=context.registry.identities.open_tokens())


def _list_keys(context: OperationContext, query: KeyQuery) -> KeyList:
    """Return the keys of apps."""
    return KeyList(keys=context.registry.api_keys.all(query.app))


def _create_key(context: OperationContext, order: KeyOrder) -> CreatedKey:
    """Create a key for an app.

    Raises:
        TopicError: a name is not valid.
        ConfigError: the name is the fleet's own, or the app has too many keys.
        IdentityError: as `ApiKeyRepository.create`.
    """
    targets = tuple(dict.fromkeys(order.allow))
    enrolment = Enrolment(name=order.app, role=Role.APP, targets=targets)
    enrolment.check()
    check_own_names([enrolment])
    expires_at = None if order.life_s is None else time.time() + order.life_s
    key = context.registry.api_keys.create(order.app, targets, expires_at)
    return CreatedKey(id=key.id, app=order.app, key=str(key), expires_at=expires_at)


def _revoke_key(context: OperationContext, key: KeyName) -> RevokedKey:
    """Revoke a key. Raises CredentialsError if there is none of this id."""
    app = context.registry.api_keys.revoke(key.key_id)
    return RevokedKey(id=key.key_id, app=app, state="revoked")


IDENTITY_HANDLERS: Final[Handlers] = {
    LIST_IDENTITIES: _list_identities,
    SHOW_IDENTITY: _show_identity,
    ENROLL: _enroll,
    INVITE: _invite,
    SUSPEND: _suspend,
    RESUME: _resume,
    REVOKE: _revoke,
    DELETE_IDENTITY: _delete_identity,
    ALLOW: _allow,
    DISALLOW: _disallow,
    LIST_TOKENS: _list_tokens,
    LIST_KEYS: _list_keys,
    CREATE_KEY: _create_key,
    REVOKE_KEY: _revoke_key,
}
