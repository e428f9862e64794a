"""`fleet bridge`, from the command line: its options, its identity and its unit."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleet.cli.bridge import bridge
from fleet.errors import ConfigError, IdentityError
from fleet.protocol.access import Role
from fleet.server.bridge.bridge_options import BridgeOptions, HouseAddress
from fleet.server.bridge.bridge_process import bridge_identity
from fleet.server.home import FleetConfig, FleetHome
from tests.fleet.conftest import add


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> FleetHome:
    """A fleet with a device, and an app whose certificate is elsewhere."""
    folder = tmp_path_factory.mktemp("bridge") / "fleet"
    home = FleetHome.create(folder, FleetConfig(host="127.0.0.1", port=1, bundle="/no/bundle"))
    with home.registry() as registry:
        add(registry, "kitchen")
        add(registry, "phone", Role.APP, targets=("kitchen",))
    return home


def test_the_bridge_has_an_identity_of_its_own_that_may_prompt_no_device(home: FleetHome) -> None:
    identity = bridge_identity(home, "house")
    assert bridge_identity(home, "house").folder == identity.folder
    with home.registry() as registry:
        grants = registry.identities.grants("house")
    assert grants is not None
    assert (grants.role, grants.targets) == (Role.APP, ())


@pytest.mark.parametrize("app", ["collector", "http-api", "operator-1", "worker-1"])
def test_the_bridge_has_no_identity_of_the_servers(home: FleetHome, app: str) -> None:
    with pytest.raises(ConfigError, match="a name of the fleet's own"):
        bridge_identity(home, app)


@pytest.mark.parametrize("app", ["phone", "kitchen"])
def test_the_bridge_does_not_take_the_name_of_another_identity(home: FleetHome, app: str) -> None:
    with pytest.raises(IdentityError):
        bridge_identity(home, app)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"host": "http://home"}, "--host 'http://home': expected a name or an address"),
        ({"user": "fleet"}, "--user and --password-file: one of them is missing"),
        ({"cert": Path("a")}, "--cert and --cert-key: one of them is missing"),
        ({"user": "fleet", "password_file": Path("/no/file")}, "/no/file"),
        ({"ca": Path("/no/ca.pem")}, "--ca /no/ca.pem"),
        ({"cert": Path("/no/cert"), "cert_key": Path("/no/key")}, "--cert /no/cert"),
        ({"maps": ["a/#/b"]}, "--map 'a/#/b'"),
        ({"app": "operator-1"}, "a name of the fleet's own"),
    ],
)
def test_options_that_cannot_be_used_are_refused(
    home: FleetHome, options: dict[str, object], reason: str, tmp_path: Path
) -> None:
    fields = {
        "host": "home.local",
        "folder": home.folder,
        "systemd": tmp_path,
        "unit_user": "fleet",
    }
    with pytest.raises(ConfigError, match=reason):
        bridge(**fields | options)  # type: ignore[arg-type]


def test_the_first_line_of_the_file_is_the_password(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("a b\nsecond line\n", encoding="utf-8")
    address = HouseAddress(host="home.local", user="fleet", password_file=file)
    assert address.password() == "a b"
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="expected a password in the first line"):
        address.check()


def test_the_port_follows_tls() -> None:
    assert HouseAddress(host="home").broker_port == 1883
    assert HouseAddress(host="home", tls=True).broker_port == 8883
    assert HouseAddress(host="home", port=1, tls=True).broker_port == 1


def test_the_unit_starts_the_same_bridge_without_its_password(
    home: FleetHome, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    password = tmp_path / "password"
    password.write_text("s3cret", encoding="utf-8")
    bridge(
        host="home.local",
        user="fleet",
        password_file=password,
        maps=["zigbee2mqtt/+", "a/b=c"],
        systemd=tmp_path / "units",
        unit_user="fleet",
        folder=home.folder,
    )
    unit = (tmp_path / "units" / "fleet-bridge-house.service").read_text(encoding="utf-8")
    start = (
        "-m fleet.cli bridge --app house --host home.local --user fleet "
        f"--password-file {password} --map zigbee2mqtt/+ --map a/b=c --home {home.folder}\n"
    )
    assert start in unit
    assert f"BindReadOnlyPaths={password}" in unit
    output = capsys.readouterr().out
    assert "systemctl enable --now fleet-bridge-house.service" in output
    assert "s3cret" not in unit + output


def test_options_are_a_command_line_again() -> None:
    house = HouseAddress(host="home", port=1, tls=True, ca_file=Path("/ca"))
    options = BridgeOptions(app="house", house=house)
    line = "--app house --host home --port 1 --ca /ca --tls"
    assert options.arguments() == line.split()
