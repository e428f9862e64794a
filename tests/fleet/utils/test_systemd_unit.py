"""The text of unit files: quoting, folders, users."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleet.errors import ConfigError
from fleet.utils.systemd_unit import ServiceUnit, folder_lines, quote, service_user, write_units


def test_percent_and_dollar_in_a_command_stand_for_themselves() -> None:
    assert quote(["run", "/srv/50%", "a b", "$HOME"]) == "run /srv/50%% 'a b' '$$HOME'"
    assert quote([r"a\b"]) == r"'a\\b'"


def test_percent_in_a_description_or_a_user_stands_for_itself() -> None:
    unit = ServiceUnit(description="worker 100%i", command=["/bin/true"], user="a%u").render()
    assert "Description=worker 100%%i\n" in unit
    assert "User=a%%u\n" in unit


def test_folders_keep_their_names_whatever_characters_they_have() -> None:
    name = r"""a b: 5% o'c "d" e\f ü"""
    writable = [Path(f"{parent}/{name}") for parent in ("/var/lib", "/home/pi", "/srv")]
    quoted = r"""a b: 5%% o'c \"d\" e\\f ü"""
    assert folder_lines(writable, [Path("/home/pi/a b")]) == [
        r"StateDirectory=a\x20b\x3a\x205%%\x20o\x27c\x20\x22d\x22\x20e\x5cf\x20ü",
        f'ReadWritePaths="/srv/{quoted}"',
        "StateDirectoryMode=0700",
        "ProtectHome=tmpfs",
        f'BindPaths="/home/pi/{quoted}"',
        'BindReadOnlyPaths="/home/pi/a b"',
    ]


@pytest.mark.parametrize("user", ["fleet\nExecStartPre=/tmp/x", "fleet\r"])
def test_a_text_of_several_lines_is_refused(user: str) -> None:
    for run in (
        ServiceUnit(description="x", command=["/bin/true"], user=user).render,
        lambda: quote(["run", f"/srv/{user}"]),
        lambda: folder_lines([Path(f"/srv/{user}")], []),
    ):
        with pytest.raises(ConfigError, match="expected no line break"):
            run()


def test_a_folder_of_the_systems_state_is_made_by_systemd() -> None:
    lines = folder_lines([Path("/var/lib/fleet")], [Path("/usr")])
    assert lines == ["StateDirectory=fleet", "StateDirectoryMode=0700", "ProtectHome=yes"]


def test_a_folder_elsewhere_is_writable_and_others_stay_read_only() -> None:
    lines = folder_lines([Path("/srv/fleet")], [Path("/opt/venv")])
    assert lines == ["ReadWritePaths=/srv/fleet", "StateDirectoryMode=0700", "ProtectHome=yes"]


def test_of_a_home_only_the_named_folders_are_visible() -> None:
    lines = folder_lines([Path("/home/pi/device")], [Path("/home/pi/venv"), Path("/home/pi/venv")])
    assert lines == [
        "StateDirectoryMode=0700",
        "ProtectHome=tmpfs",
        "BindPaths=/home/pi/device",
        "BindReadOnlyPaths=/home/pi/venv",
    ]


def test_a_service_without_a_watchdog_does_not_wait_for_messages() -> None:
    unit = ServiceUnit(description="x", command=["/bin/true"], user="fleet").render()
    assert "Type=exec\n" in unit
    assert "WatchdogSec" not in unit


@pytest.mark.parametrize("user", ["fleet", "fleet@example.org", "EXAMPLE\\fleet", "1000", "f"])
def test_a_user_that_is_given_need_not_exist_yet(tmp_path: Path, user: str) -> None:
    assert service_user(tmp_path, user) == user


@pytest.mark.parametrize("user", ["-x", " fleet", "fleet ", "4294967295", "65535", "a:b", "a/b"])
def test_a_user_that_systemd_refuses_is_refused(tmp_path: Path, user: str) -> None:
    with pytest.raises(ConfigError, match="expected a name as in /etc/passwd"):
        service_user(tmp_path, user)


def test_no_service_runs_as_root_by_accident(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"belongs to root.*--user"):
        service_user(Path("/"), None)
    with pytest.raises(ConfigError, match="pass --service-user"):
        service_user(Path("/"), None, "--service-user")
    with pytest.raises(ConfigError, match="name a folder that exists"):
        service_user(Path("/no/such/folder"), None)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write units into"):
        write_units(tmp_path / "file", {"a.service": ""})
