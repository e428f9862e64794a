"""`fleet identities`, `fleet group` and `fleet delete`, from the command line."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fleet.protocol.access import Role
from fleet.protocol.desired_config import Settings
from fleet.registry.targets import Scope, Target
from fleet.server.home import FleetConfig, FleetHome
from tests.cli.test_errors import assert_one_clear_line
from tests.command_lines import run
from tests.fleet.conftest import add, report


@pytest.fixture
def home(tmp_path: Path) -> FleetHome:
    """A fleet with two devices, and an app that may prompt one of them and a group."""
    config = FleetConfig(host="127.0.0.1", port=1, bundle="/no/bundle")
    home = FleetHome.create(tmp_path / "state", config)
    with home.registry() as registry:
        add(registry, "kitchen", group="home")
        add(registry, "attic")
        add(registry, "phone", Role.APP)
        registry.identities.tag("kitchen", {"floor": "1"})
        registry.identities.allow("phone", ["kitchen", "home"])
    return home


def run_json(home: FleetHome, *arguments: str) -> Any:
    done = run(*arguments, "--json", "--home", str(home.folder))
    assert done.returncode == 0, done.stderr
    return msgspec.json.decode(done.stdout)


def test_identities_are_listed_with_role_state_group_tags_and_rights(home: FleetHome) -> None:
    rows = {row["name"]: row for row in run_json(home, "identities")}
    assert {"collector", "kitchen", "attic", "phone", "worker-1"} <= rows.keys()
    kitchen = rows["kitchen"]
    assert (kitchen["role"], kitchen["state"]) == ("device", "active")
    assert (kitchen["group"], kitchen["tags"]) == ("home", {"floor": "1"})
    assert kitchen["not_after"] > time.time()
    assert rows["phone"]["targets"] == ["home", "kitchen"]
    assert [row["name"] for row in run_json(home, "identities", "--role", "app")] == ["phone"]
    table = run("identities", "--role", "app", "--home", str(home.folder)).stdout
    assert "phone" in table
    assert "kitchen" in table


def test_a_device_changes_its_group_and_the_rights_follow(home: FleetHome) -> None:
    assert run_json(home, "group", "attic", "home") == {"device": "attic", "group": "home"}
    with home.registry() as registry:
        grants = registry.identities.grants("phone")
    assert grants is not None
    assert grants.targets == ("attic", "kitchen")
    assert run_json(home, "group", "attic", "--none") == {"device": "attic", "group": None}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("group", "attic"), "expected a GROUP or --none"),
        (("group", "attic", "kitchen"), "is the name of an identity"),
        (("group", "cellar", "home"), "unknown device 'cellar'"),
        (("group", "attic", "Up Stairs"), "Up Stairs"),
        (("delete", "kitchen"), "which is active; first give 'fleet revoke kitchen'"),
        (("delete", "cellar"), "unknown identity 'cellar'"),
    ],
)  # fmt: skip
def test_a_change_that_is_not_possible_is_refused(
    home: FleetHome, words: tuple[str, ...], message: str
) -> None:
    done = run(*words, "--home", str(home.folder))
    assert_one_clear_line(done)
    assert message in done.stderr


def test_a_revoked_device_is_deleted_and_its_statistics_stay(home: FleetHome) -> None:
    with home.registry() as registry:
        registry.stats.record_report("kitchen", report("g1"))
        registry.desired_state.change_settings(
            Target(Scope.DEVICE, "kitchen"), lambda _: Settings(max_new_tokens=7)
        )
        registry.identities.revoke("kitchen")
    assert run_json(home, "delete", "kitchen") == {"name": "kitchen", "state": "deleted"}
    assert "kitchen" not in {row["name"] for row in run_json(home, "identities")}
    assert "kitchen" not in {row["device"] for row in run_json(home, "devices")}
    with home.registry() as registry:
        (row,) = registry.stats.per_device("kitchen")
        assert row.generations == 1
        assert registry.identities.denied() == ["kitchen"]
        assert "kitchen" not in registry.desired_state.configs()
    assert_one_clear_line(run("suspend", "kitchen", "--home", str(home.folder)))


def test_a_deleted_name_is_enrolled_again_without_its_earlier_rights(home: FleetHome) -> None:
    with home.registry() as registry:
        registry.identities.revoke("kitchen")
        registry.identities.delete("kitchen")
        add(registry, "kitchen")
        (row,) = (row for row in registry.identities.all() if row.name == "kitchen")
        assert (row.state, row.group, row.tags) == ("active", None, {})
        grants = registry.identities.grants("phone")
        assert grants is not None
        assert grants.targets == ()


def test_a_deleted_certificate_stays_on_the_revocation_list(home: FleetHome) -> None:
    home.enroll("oven", Role.DEVICE, home.folder / "oven")
    with home.registry() as registry:
        registry.identities.revoke("oven")
        revoked = registry.identities.revoked_certificates()
        registry.identities.delete("oven")
        assert registry.identities.revoked_certificates() == revoked
    assert len(revoked) == 1


def test_an_identity_that_has_never_joined_is_deleted(home: FleetHome) -> None:
    done = run("enroll", "balcony", "--home", str(home.folder))
    assert done.returncode == 0, done.stderr
    run_json(home, "delete", "balcony")
    assert "balcony" not in {row["name"] for row in run_json(home, "identities")}
    assert "balcony" not in {row["device"] for row in run_json(home, "stats")}
