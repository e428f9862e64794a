"""`fleet allow`, `disallow` and `tag`, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from fleet.cli.allow import tag_device
from fleet.errors import ConfigError
from fleet.protocol.access import Role
from fleet.server.home import FleetConfig, FleetHome
from tests.cli.test_errors import assert_one_clear_line
from tests.command_lines import run
from tests.fleet.conftest import add


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A fleet's folder: two devices, and an app without targets."""
    with FleetHome.create(
        tmp_path / "state", FleetConfig(host="127.0.0.1", port=1, bundle="/no/bundle")
    ).registry() as registry:
        add(registry, "kitchen", group="home")
        add(registry, "attic")
        add(registry, "phone", Role.APP)
    return tmp_path / "state"


def run_json(home: Path, *arguments: str) -> Any:
    done = run(*arguments, "--json", "--home", str(home))
    assert done.returncode == 0, done.stderr
    return msgspec.json.decode(done.stdout)


def test_an_app_is_allowed_devices_by_name_and_tag_and_loses_them_again(home: Path) -> None:
    assert run_json(home, "tag", "kitchen", "floor=1", "wing=east") == {
        "device": "kitchen", "tags": {"floor": "1", "wing": "east"},
    }  # fmt: skip
    assert run_json(home, "allow", "phone", "floor=1", "attic") == {
        "app": "phone",
        "targets": ["attic", "floor=1"],
    }
    with FleetHome.load(home).registry() as registry:
        grants = registry.identities.grants("phone")
        assert grants is not None
        assert grants.targets == ("attic", "kitchen")
    assert run_json(home, "disallow", "phone", "attic") == {"app": "phone", "targets": ["floor=1"]}
    assert run_json(home, "tag", "kitchen", "--remove", "floor") == {
        "device": "kitchen",
        "tags": {"wing": "east"},
    }
    with FleetHome.load(home).registry() as registry:
        grants = registry.identities.grants("phone")
        assert grants is not None
        assert grants.targets == ()


def test_devices_are_listed_by_tag_and_by_state(home: Path) -> None:
    run_json(home, "tag", "kitchen", "floor=1")
    assert [row["device"] for row in run_json(home, "devices", "--tag", "floor=1")] == ["kitchen"]
    assert run_json(home, "devices", "--tag", "floor=2") == []
    assert len(run_json(home, "devices", "--state", "active")) == 2
    assert run_json(home, "devices", "--state", "suspended") == []
    table = run("devices", "--home", str(home), COLUMNS="200")
    assert "floor=1" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("allow", "phone", "cellar"), ("cannot allow 'cellar'", "enrol it first")),
        (
            ("allow", "kitchen", "attic"),
            ("expected the name of an app, got 'kitchen'", "it is a device"),
        ),
        (("allow", "ghost", "attic"), ("'ghost'", "fleet enroll ghost --role app")),
        (("disallow", "phone", "attic"), ("was not allowed attic", "nothing")),
        (("tag", "kitchen"), ("nothing to do", "--remove")),
        (("tag", "kitchen", "first-floor"), ("'first-floor'", "for example floor=1")),
        (("tag", "kitchen", "Floor=1"), ("'Floor'", "a-z")),
        (("tag", "ghost", "floor=1"), ("unknown device 'ghost'",)),
        (("tag", "kitchen", "--remove", "nosuch"), ("'kitchen' has no tag nosuch; it has ",)),
    ],
)
def test_a_mistake_is_reported_in_one_line(
    home: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_one_clear_line(run(*arguments, "--home", str(home)), *words)


def test_a_tag_that_is_both_set_and_removed_is_refused() -> None:
    with pytest.raises(ConfigError, match="floor is to be set and to be removed"):
        tag_device("kitchen", tags=["floor=1", "side=north"], remove=["floor"])
