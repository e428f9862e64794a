"""Operations on operators and their keys."""

from __future__ import annotations

from typing import Final

from fleet.operator_api.operation import NoFields
from fleet.operator_api.operator_operations import (
    ADD_OPERATOR,
    CREATE_OPERATOR_KEY,
    LIST_OPERATOR_KEYS,
    LIST_OPERATORS,
    MAKE_OPERATOR_LINK,
    REMOVE_OPERATOR,
    REVOKE_OPERATOR_KEY,
    SET_OPERATOR_ROLE,
    ChangedRole,
    CreatedOperatorKey,
    NewOperator,
    OperatorKeyList,
    OperatorKeyName,
    OperatorKeyOrder,
    OperatorKeyQuery,
    OperatorLink,
    OperatorList,
    OperatorName,
    RemovedOperator,
    RevokedOperatorKey,
)
from fleet.server.console_address import console_url
from fleet.server.operations.context import Handlers, OperationContext

SIGN_IN_PATH: Final = "/sign-in"


def _list_operators(context: OperationContext, _: NoFields) -> OperatorList:
    """Return all operators."""
    return OperatorList(operators=context.registry.operators.all())


def _add_operator(context: OperationContext, new: NewOperator) -> OperatorLink:
    """Add an operator. Raises TopicError or ConfigError."""
    context.registry.operators.add(new.name, new.role)
    return _make_link(context, OperatorName(name=new.name))


def _set_role(context: OperationContext, change: NewOperator) -> ChangedRole:
    """Change a role. Raises ConfigError if there is no such operator."""
    context.registry.operators.set_role(change.name, change.role)
    return ChangedRole(name=change.name, role=change.role)


def _remove_operator(context: OperationContext, key: OperatorName) -> RemovedOperator:
    """Remove an operator. Raises ConfigError if there is none of this name."""
    context.registry.operators.remove(key.name)
    return RemovedOperator(name=key.name)


def _make_link(context: OperationContext, key: OperatorName) -> OperatorLink:
    """Make a link. Raises ConfigError if there is no such operator."""
    made = context.registry.operators.make_link(key.name)
    base = console_url(context.home.folder) or ""
    return OperatorLink(
        name=key.name,
        link=f"{base}{SIGN_IN_PATH}?link={made.secret}",
        expires_at=made.expires_at or 0.0,
    )


def _list_keys(context: OperationContext, query: OperatorKeyQuery) -> OperatorKeyList:
    """Return the keys of operators."""
    return OperatorKeyList(keys=context.registry.operators.keys(query.operator))


def _create_key(context: OperationContext, order: OperatorKeyOrder) -> CreatedOperatorKey:
    """Create a key. Raises ConfigError if there is no such operator, or it has too many."""
    made = context.registry.operators.create_key(order.name, order.life_s)
    return CreatedOperatorKey(
        id=made.secret.id,
        operator=order.name,
        key=str(made.secret),
        expires_at=made.expires_at,
    )


def _revoke_key(context: OperationContext, key: OperatorKeyName) -> RevokedOperatorKey:
    """Revoke a key. Raises CredentialsError if there is none of this id."""
    operator = context.registry.operators.revoke_key(key.key_id)
    return RevokedOperatorKey(id=key.key_id, operator=operator)


OPERATOR_HANDLERS: Final[Handlers] = {
    LIST_OPERATORS: _list_operators,
    ADD_OPERATOR: _add_operator,
    SET_OPERATOR_ROLE: _set_role,
    REMOVE_OPERATOR: _remove_operator,
    MAKE_OPERATOR_LINK: _make_link,
    LIST_OPERATOR_KEYS: _list_keys,
    CREATE_OPERATOR_KEY: _create_key,
    REVOKE_OPERATOR_KEY: _revoke_key,
}
