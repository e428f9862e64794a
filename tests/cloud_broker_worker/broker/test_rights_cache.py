"""The cache of rights, the rules of a mosquitto, and the rights of one identity."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloud_broker_worker.broker.mosquitto import acl_rules, write_config
from cloud_broker_worker.broker.rights_cache import CACHE_S, CertificateHolder, RightsCache
from fleet.errors import ConfigError
from fleet.identity.identity import ServerTls
from fleet.protocol.access import Action, Grants, Role

DEVICE = Grants(Role.DEVICE, "d1")
HOLDER = CertificateHolder("d1", "a" * 64)
TLS = ServerTls(Path("/tls/ca.pem"), Path("/tls/cert.pem"), Path("/tls/key.pem"))


class Registry:
    def __init__(self) -> None:
        self.known: dict[str, Grants] = {"d1": DEVICE}
        self.num_questions = 0

    def admitted(self, name: str, fingerprint: str) -> Grants | None:
        self.num_questions += 1
        return self.known.get(name) if fingerprint == HOLDER.fingerprint else None


def test_the_registry_is_read_once_in_two_seconds() -> None:
    registry = Registry()
    now = [100.0]
    rights = RightsCache(registry.admitted, lambda: now[0])
    assert [rights.get(HOLDER), rights.get(HOLDER)] == [DEVICE, DEVICE]
    assert registry.num_questions == 1


def test_rights_that_were_taken_away_are_gone_after_two_seconds() -> None:
    registry = Registry()
    now = [100.0]
    rights = RightsCache(registry.admitted, lambda: now[0])
    assert rights.permits(HOLDER, Action.PUBLISH, "ce/v1/d/d1/status")
    registry.known.clear()
    now[0] += CACHE_S
    assert not rights.permits(HOLDER, Action.PUBLISH, "ce/v1/d/d1/status")


def test_another_certificate_of_the_same_name_has_rights_of_its_own() -> None:
    rights = RightsCache(Registry().admitted)
    assert rights.get(HOLDER) == DEVICE
    assert rights.get(CertificateHolder("d1", "b" * 64)) is None


def test_a_name_without_enrolment_has_no_rights() -> None:
    assert not RightsCache(Registry().admitted).permits(
        CertificateHolder("d9", HOLDER.fingerprint), Action.PUBLISH, "ce/v1/d/d9/status"
    )


@pytest.mark.parametrize(
    ("grants", "action", "topic", "allowed"),
    [
        (DEVICE, Action.PUBLISH, "ce/v1/d/d1/status", True),
        (DEVICE, Action.PUBLISH, "ce/v1/d/d2/status", False),
        (DEVICE, Action.SUBSCRIBE, "ce/v1/d/d1/status", False),
        (DEVICE, Action.SUBSCRIBE, "ce/v1/d/d1/prompt/+/+", True),
        (DEVICE, Action.SUBSCRIBE, "ce/v1/d/d1/prompt/#", False),
        (Grants(Role.APP, "a1", ("d1", "d3")), Action.PUBLISH, "ce/v1/d/d3/prompt/a1/r1", True),
        (Grants(Role.APP, "a1", ("d1", "d3")), Action.PUBLISH, "ce/v1/d/d2/prompt/a1/r1", False),
        (Grants(Role.APP, "a1"), Action.PUBLISH, "ce/v1/d//prompt/a1/r1", False),
    ],
)
def test_an_identity_has_the_rights_of_its_role_and_targets(
    grants: Grants, action: Action, topic: str, allowed: bool
) -> None:
    assert grants.permits(action, topic) is allowed


def test_mosquitto_gets_the_same_rights_line_by_line() -> None:
    assert acl_rules(Grants(Role.APP, "a1", ("d1",))) == [
        "user a1",
        "topic write ce/v1/d/d1/prompt/a1/+",
        "topic write ce/v1/d/d1/cancel/a1/+",
        "topic write ce/v1/e/a1/+",
        "topic read ce/v1/d/+/reply/a1/+",
        "topic read ce/v1/d/d1/status",
    ]


def test_mosquittos_rights_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    config = write_config(tmp_path / "mosquitto", 8883, TLS, [DEVICE])
    acl = config.parent / "acl"
    assert acl.stat().st_mode & 0o777 == 0o600
    assert f"acl_file {acl}" in config.read_text()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="choose another folder"):
        write_config(tmp_path / "file", 8883, TLS, [DEVICE])
