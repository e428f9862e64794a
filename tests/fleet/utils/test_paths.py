"""Paths, and users without a name or a home."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import platformdirs
import pytest

from cloud_broker_worker.broker.mosquitto import write_config
from fleet.errors import ConfigError
from fleet.identity.identity import ServerTls
from fleet.registry.store import Registry
from fleet.server.home import FleetHome
from fleet.utils import paths
from fleet.utils.paths import absolute_path, existing_folder, rights_remedy, user_name
from fleet.utils.systemd_unit import service_user
from tests.pipes import in_pipe

UNKNOWN = 54321
"""A user id that no account has."""


def test_a_path_is_expanded_and_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert absolute_path(Path("~/fleet")) == tmp_path / "fleet"
    assert absolute_path(Path("a/../b")) == tmp_path / "b"


def test_the_fleets_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FLEET_HOME", "~/fleet")
    assert FleetHome.find(None) == tmp_path / "fleet"
    assert FleetHome.find(Path("~/other")) == tmp_path / "other"


@pytest.mark.parametrize("home", ["'/srv/fleet'", '"/srv/fleet"', "/srv/fleet\r", "\t", "  "])
def test_traces_of_an_environment_file_in_the_fleets_folder_are_refused(
    home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEET_HOME", home)
    with pytest.raises(ConfigError, match=r"FLEET_HOME is .*: expected a folder's path, without"):
        FleetHome.find(None)


def test_a_user_without_a_name_has_a_number() -> None:
    assert user_name(UNKNOWN) == str(UNKNOWN)
    assert user_name(0) == "root"


def test_a_user_without_a_name_is_a_number_in_the_audit_log_and_to_mosquitto(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleet.utils.paths.os.geteuid", lambda: UNKNOWN)
    with Registry.open(f"sqlite:///{tmp_path}/registry.sqlite") as registry:
        registry.audit_log.add("shared-identity", "d1")
        (entry,) = registry.audit_log.entries()
    assert entry.actor.startswith(f"{UNKNOWN}@")
    config = write_config(tmp_path, 1, ServerTls(tmp_path, tmp_path, tmp_path), ())
    assert f"user {UNKNOWN}" in config.read_text(encoding="utf-8").splitlines()


def test_a_user_without_a_home_is_told_to_set_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def expand(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", expand)
    monkeypatch.delenv("FLEET_HOME", raising=False)
    with pytest.raises(ConfigError, match="no home folder; set HOME, or give whole paths"):
        FleetHome.find(None)


def test_older_and_newer_versions_of_platformdirs_say_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: str) -> Path:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr(platformdirs, "user_cache_path", fail)
    with pytest.raises(ConfigError, match="no home folder"):
        paths.user_cache_folder()


def test_the_disk_of_a_folder_that_does_not_exist_is_its_parents(tmp_path: Path) -> None:
    assert existing_folder(tmp_path / "a" / "b") == tmp_path
    assert existing_folder(Path("/nonexistent")) == Path("/")


def test_a_file_that_another_user_has_left_is_to_be_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after `sudo fleet ...` in the folder of a service's user."""
    file = tmp_path / "ca.pem"
    file.touch()
    assert rights_remedy(file).startswith(f"run this as its owner (sudo -u {user_name()})")
    owners = {file: UNKNOWN, tmp_path: UNKNOWN}
    monkeypatch.setattr(Path, "stat", lambda path: SimpleNamespace(st_uid=owners[path]))
    assert rights_remedy(file).startswith(f"run this as its owner (sudo -u '#{UNKNOWN}')")
    owners[file] = 0
    assert rights_remedy(file).endswith(f"the owner of its folder: `sudo chown {UNKNOWN} {file}`")


def test_a_command_to_paste_quotes_its_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "my fleet; ls" / "ca.pem"
    file.parent.mkdir()
    file.touch()
    owners = {file: 0, file.parent: UNKNOWN}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", lambda path: SimpleNamespace(st_uid=owners[path]))
        assert rights_remedy(file).endswith(f"`sudo chown {UNKNOWN} '{file}'`")
        owners[file] = UNKNOWN
        owners[file.parent] = 0
        with pytest.raises(ConfigError, match=f"recursive USER '{file.parent}'"):
            service_user(file.parent, None)


def test_a_pipe_keeps_its_path_and_a_link_does_not(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "file")
    assert absolute_path(link) == tmp_path / "file"
    with in_pipe(b"content") as path:
        assert absolute_path(path).read_bytes() == b"content"
