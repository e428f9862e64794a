"""Operators: their roles, and the links, sessions and keys that stand for them."""

from __future__ import annotations

import time

import pytest

from fleet.errors import ConfigError, CredentialsError, TopicError
from fleet.registry.operators import repository
from fleet.registry.operators.operator_secret import OperatorSecret, OperatorSecretKind
from fleet.registry.operators.repository import KnownOperator
from fleet.registry.store import Registry

SESSION = OperatorSecretKind.SESSION
KEY = OperatorSecretKind.KEY


@pytest.fixture
def staffed(registry: Registry) -> Registry:
    """A registry with one operator."""
    registry.operators.add("ada", "operator")
    return registry


def open_session(registry: Registry, name: str = "ada") -> str:
    link = registry.operators.make_link(name)
    return str(registry.operators.sign_in(str(link.secret)).secret)


def test_a_link_signs_in_once(staffed: Registry) -> None:
    link = str(staffed.operators.make_link("ada").secret)
    session = staffed.operators.sign_in(link)
    known = staffed.operators.authenticate(SESSION, str(session.secret))
    assert known == KnownOperator("ada", "operator")
    with pytest.raises(CredentialsError, match="this link was used"):
        staffed.operators.sign_in(link)


def test_a_link_of_yesterday_does_not_sign_in(
    staffed: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repository, "LINK_S", -1.0)
    link = str(staffed.operators.make_link("ada").secret)
    with pytest.raises(CredentialsError, match="this link is too old"):
        staffed.operators.sign_in(link)


def test_a_session_ends_by_signing_out_by_its_age_and_when_it_is_idle(
    staffed: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(staffed)
    staffed.operators.sign_out(session)
    with pytest.raises(CredentialsError, match="unknown or was ended"):
        staffed.operators.authenticate(SESSION, session)
    session = open_session(staffed)
    monkeypatch.setattr(repository, "IDLE_S", -1.0)
    with pytest.raises(CredentialsError, match="has ended"):
        staffed.operators.authenticate(SESSION, session)
    monkeypatch.undo()
    monkeypatch.setattr(repository, "SESSION_S", -1.0)
    session = open_session(staffed)
    with pytest.raises(CredentialsError, match="has ended"):
        staffed.operators.authenticate(SESSION, session)


def test_a_change_of_role_holds_for_open_sessions_and_a_removal_ends_them(
    staffed: Registry,
) -> None:
    session = open_session(staffed)
    key = str(staffed.operators.create_key("ada", None).secret)
    staffed.operators.set_role("ada", "viewer")
    assert staffed.operators.authenticate(SESSION, session).role == "viewer"
    assert staffed.operators.authenticate(KEY, key).role == "viewer"
    staffed.operators.remove("ada")
    for kind, text in ((SESSION, session), (KEY, key)):
        with pytest.raises(CredentialsError):
            staffed.operators.authenticate(kind, text)
    assert staffed.operators.all() == []


def test_a_secret_of_one_kind_is_none_of_another(staffed: Registry) -> None:
    link = str(staffed.operators.make_link("ada").secret)
    key = str(staffed.operators.create_key("ada", None).secret)
    with pytest.raises(CredentialsError):
        staffed.operators.authenticate(SESSION, link)
    with pytest.raises(CredentialsError):
        staffed.operators.authenticate(SESSION, key.removeprefix("fleet-operator-"))
    with pytest.raises(CredentialsError):
        staffed.operators.authenticate(KEY, link)
    with pytest.raises(CredentialsError):
        staffed.operators.sign_in(open_session(staffed))


def test_a_wrong_secret_with_a_right_id_is_refused_and_not_repeated(staffed: Registry) -> None:
    session = OperatorSecret.parse(SESSION, open_session(staffed))
    wrong = f"{session.id}-{'0' * 64}"
    with pytest.raises(CredentialsError) as caught:
        staffed.operators.authenticate(SESSION, wrong)
    assert session.id not in str(caught.value)
    with pytest.raises(CredentialsError) as caught:
        staffed.operators.authenticate(SESSION, "secret text")
    assert "secret text" not in str(caught.value)


def test_keys_are_listed_without_secrets_and_revoked_by_id(staffed: Registry) -> None:
    new = staffed.operators.create_key("ada", 60.0)
    (row,) = staffed.operators.keys()
    assert (row.id, row.operator, row.state) == (new.secret.id, "ada", "active")
    assert new.secret.secret not in str(row)
    assert staffed.operators.revoke_key(row.id) == "ada"
    with pytest.raises(CredentialsError, match="unknown key"):
        staffed.operators.revoke_key(row.id)


def test_an_operator_has_a_name_of_its_own(staffed: Registry) -> None:
    with pytest.raises(ConfigError, match="there is an operator 'ada'"):
        staffed.operators.add("ada", "admin")
    with pytest.raises(TopicError):
        staffed.operators.add("A/b", "admin")
    for change in (
        lambda: staffed.operators.set_role("eve", "admin"),
        lambda: staffed.operators.remove("eve"),
        lambda: staffed.operators.make_link("eve"),
    ):
        with pytest.raises(ConfigError, match="no operator 'eve'"):
            change()


def test_operators_have_a_limited_number_of_secrets(
    staffed: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repository, "MAX_SECRETS", 2)
    for _ in range(2):
        staffed.operators.create_key("ada", None)
    with pytest.raises(ConfigError, match="which is the most"):
        staffed.operators.create_key("ada", None)


def test_what_operators_do_is_in_the_audit_log_without_secrets(staffed: Registry) -> None:
    began = time.time() - 60
    session = open_session(staffed)
    staffed.operators.sign_out(session)
    entries = staffed.audit_log.entries("ada", began)
    actions = [entry.action for entry in entries]
    assert actions == [
        "operator_sign_out", "operator_sign_in", "operator_link", "operator_add",
    ]  # fmt: skip
    assert entries[0].actor == "ada"
    assert OperatorSecret.parse(SESSION, session).secret not in str(entries)
