"""`fleet renew` and `fleet authority`: certificates and authorities that follow each other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from edge_agent.provisioning.join import join_fleet
from fleet.errors import ConfigError, IdentityError, StateError, UnknownDeviceError
from fleet.identity.identity import Identity
from fleet.protocol.access import Role
from fleet.protocol.enrolment_api import EnrolmentToken
from fleet.server.fleet_checks import check_fleet
from fleet.server.home import WORKER, FleetConfig, FleetHome
from fleet.server.supervisor import worker_folder
from tests.brokers import fingerprint_of
from tests.cli.test_enroll import HOST, fleet, fleet_json


@pytest.fixture(scope="module")
def fresh_fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = FleetConfig(host=HOST, port=1, bundle="/no/bundle")
    return FleetHome.create(tmp_path_factory.mktemp("fresh") / "state", config).folder


@pytest.fixture
def home(tmp_path: Path, fresh_fleet: Path) -> FleetHome:
    """A fleet of its own for each test; its processes do not run."""
    return FleetHome.load(Path(shutil.copytree(fresh_fleet, tmp_path / "state")))


def row(home: FleetHome, name: str) -> Any:
    with home.registry() as registry:
        return next(row for row in registry.identities.all() if row.name == name)


def test_a_folder_is_renewed_and_its_identity_keeps_its_rights(
    home: FleetHome, tmp_path: Path
) -> None:
    home.enroll("kitchen", Role.DEVICE, tmp_path / "kitchen", group="house")
    app = home.enroll("display", Role.APP, tmp_path / "display", allow=("house",))
    before = fingerprint_of(app)
    fleet(home.folder, "renew", "display", "--out", str(app.folder))
    assert fingerprint_of(app) != before
    assert row(home, "display").targets == ("house",)
    with home.registry() as registry:
        assert registry.identities.admitted("display", fingerprint_of(app)) is not None


def test_a_token_renews_an_identity_that_keeps_its_group_and_tags(
    home: FleetHome, tmp_path: Path
) -> None:
    fleet(home.folder, "enroll", "kitchen", "--group", "house", "--tag", "floor=1")
    printed = fleet_json(home.folder, "renew", "kitchen")
    assert printed["name"] == "kitchen"
    assert printed["command"].startswith("edge-agent join ")
    kitchen = row(home, "kitchen")
    assert (kitchen.group, kitchen.tags, kitchen.state) == ("house", {"floor": "1"}, "pending")


def test_an_identity_of_the_fleet_is_renewed_in_its_own_folder(home: FleetHome) -> None:
    identity = home.identity("operator-1", Role.SERVER)
    before = fingerprint_of(identity)
    fleet(home.folder, "renew", "operator-1")
    assert fingerprint_of(identity) != before
    Identity.load(identity.folder).ssl_context()


def test_the_folder_of_another_identity_is_not_renewed(home: FleetHome, tmp_path: Path) -> None:
    for name, role in (("kitchen", Role.DEVICE), ("k2", Role.DEVICE), ("phone", Role.APP)):
        home.enroll(name, role, tmp_path / name)
    certificates = {path: path.read_bytes() for path in tmp_path.glob("*/cert.pem")}
    for name, owner in (("phone", "kitchen"), ("kitchen", "phone"), ("kitchen", "k2")):
        words = f"{owner} is the identity of {owner}, expected that of {name}"
        for command in (("renew", name), ("enroll", name, "--force")):
            with pytest.raises(IdentityError, match=words):
                fleet(home.folder, *command, "--out", str(tmp_path / owner))
    assert certificates == {path: path.read_bytes() for path in tmp_path.glob("*/cert.pem")}
    assert row(home, "kitchen").state == "active"


@pytest.mark.parametrize(
    ("file", "content"), [("manifest.json", "bundle"), ("fleet.json", "fleet")]
)
def test_no_identity_is_written_into_a_bundle_or_a_fleet(
    home: FleetHome, tmp_path: Path, file: str, content: str
) -> None:
    home.enroll("kitchen", Role.DEVICE, tmp_path / "kitchen")
    other = tmp_path / "other"
    other.mkdir()
    (other / file).touch()
    for command in (("enroll", "new"), ("renew", "kitchen")):
        with pytest.raises(IdentityError, match=f"other holds a {content}; name another folder"):
            fleet(home.folder, *command, "--out", str(other))
    with pytest.raises(IdentityError, match=f"other holds a {content}; name another folder"):
        join_fleet(EnrolmentToken("0" * 64, "0" * 16, "0" * 64), "https://localhost:1", other)
    assert [path.name for path in other.iterdir()] == [file]


@pytest.mark.parametrize("options", [(), ("--shared-subscriptions",)])
def test_a_worker_shares_its_subscriptions_in_a_new_folder(
    home: FleetHome, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """It does if the option is given, or if the fleet's own workers do."""
    worker_folder(home, WORKER, shares=not options)
    for name, role in (("cloud", Role.WORKER), ("kitchen", Role.DEVICE)):
        home.enroll(name, role, tmp_path / name)
    out = tmp_path / "moved"
    fleet(home.folder, "renew", "cloud", "--out", str(out), *options)
    assert Identity.load(out).config.shared_subscriptions
    fleet(home.folder, "renew", "cloud", "--out", str(out))
    assert Identity.load(out).config.shared_subscriptions
    fleet(home.folder, "renew", "kitchen", "--out", str(tmp_path / "other"))
    assert not Identity.load(tmp_path / "other").config.shared_subscriptions


def test_only_a_workers_folder_shares_subscriptions(home: FleetHome, tmp_path: Path) -> None:
    home.enroll("kitchen", Role.DEVICE, tmp_path / "kitchen")
    home.enroll("cloud", Role.WORKER, tmp_path / "cloud")
    out = str(tmp_path / "kitchen")
    with pytest.raises(ConfigError, match="only a worker shares a subscription; 'kitchen'"):
        fleet(home.folder, "renew", "kitchen", "--out", out, "--shared-subscriptions")
    with pytest.raises(ConfigError, match="give --out DIR"):
        fleet(home.folder, "renew", "cloud", "--shared-subscriptions")


def test_a_revoked_or_unknown_identity_is_not_renewed(home: FleetHome, tmp_path: Path) -> None:
    home.enroll("kitchen", Role.DEVICE, tmp_path / "kitchen")
    fleet(home.folder, "revoke", "kitchen")
    for options in ((), ("--out", str(tmp_path / "kitchen"))):
        with pytest.raises(StateError, match="'kitchen', which is revoked"):
            fleet(home.folder, "renew", "kitchen", *options)
    with pytest.raises(UnknownDeviceError, match="fleet enroll"):
        fleet(home.folder, "renew", "cellar")


def test_the_doctor_counts_identities_that_need_the_old_authority(
    home: FleetHome, tmp_path: Path
) -> None:
    home.enroll("kitchen", Role.DEVICE, tmp_path / "kitchen")
    fleet(home.folder, "authority", "rotate")
    home.renew_own()
    checks = {check.name: check for check in check_fleet(home.folder)}
    assert "not renewed yet: 1 identity" in checks["authority"].found
    assert checks["authority"].problem == ""
    with pytest.raises(StateError, match="kitchen; wait until they have renewed"):
        fleet(home.folder, "authority", "retire")
    fleet(home.folder, "renew", "kitchen", "--out", str(tmp_path / "kitchen"))
    checks = {check.name: check for check in check_fleet(home.folder)}
    assert "fleet authority retire" in checks["authority"].problem
    fleet(home.folder, "authority", "retire")
    with home.registry() as registry:
        actions = [entry.action for entry in registry.audit_log.entries("authority")]
    assert actions == ["retire_authority", "rotate_authority"]


def test_an_identity_that_was_not_renewed_can_be_locked_out(
    home: FleetHome, tmp_path: Path
) -> None:
    home.enroll("kitchen", Role.DEVICE, tmp_path / "kitchen")
    fleet(home.folder, "authority", "rotate")
    fleet(home.folder, "authority", "retire", "--force")
    assert home.authority().successor is None
