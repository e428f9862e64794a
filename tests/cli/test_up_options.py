"""`fleet up` and `fleet init` on a folder that has a fleet: nothing is lost silently."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import msgspec
import pytest

from fleet.bundles.manifest import Bundle
from fleet.cli.init import init
from fleet.cli.server import server
from fleet.cli.up import up
from fleet.errors import BundleError, ConfigError, FleetError
from fleet.server.fleet_options import FleetOptions, hold_folder, resolve_config
from fleet.server.home import (
    DEFAULT_PORT,
    DEFAULT_SERVICE_PORT,
    REGISTRY_FILE,
    FleetConfig,
    FleetHome,
    create_fleet,
)
from tests.brokers import free_port


def start(folder: Path, options: FleetOptions) -> FleetConfig:
    return FleetHome.create(folder, resolve_config(folder, options)).config


def test_a_new_fleet_has_the_defaults(tmp_path: Path) -> None:
    config = resolve_config(tmp_path, FleetOptions())
    assert (config.host, config.port) == ("127.0.0.1", DEFAULT_PORT)
    assert (config.service_port, config.bundle) == (DEFAULT_SERVICE_PORT, "")


def test_what_was_given_once_is_kept(
    tmp_path: Path, tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    options = FleetOptions(
        host="gateway.local",
        port=2000,
        service_port=0,
        service_host="fleet.example",
        bundle=str(tiny_bundle.folder),
        retention_days=7,
    )
    first = start(tmp_path, options)
    assert start(tmp_path, FleetOptions()) == first
    assert capsys.readouterr().err == ""


def test_a_fleet_whose_bundle_is_gone_does_not_serve_another_model(tmp_path: Path) -> None:
    folder = tmp_path / "fleet"
    start(folder, FleetOptions(bundle="/no/bundle"))
    before = (folder / "fleet.json").read_bytes()
    with pytest.raises(BundleError, match=r"no usable bundle in /no/bundle: .* mount the disk"):
        up(folder)
    assert (folder / "fleet.json").read_bytes() == before


def test_the_default_bundle_of_another_user_is_found_again(tmp_path: Path) -> None:
    folder = tmp_path / "bundles" / "default-0123456789abcdef"
    start(tmp_path / "fleet", FleetOptions(bundle=str(folder)))
    assert resolve_config(tmp_path / "fleet", FleetOptions()).bundle == ""


def test_a_new_address_is_kept_and_reported(
    tmp_path: Path, tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(tiny_bundle.folder)
    start(tmp_path, FleetOptions(bundle=bundle, port=2000, service_port=0))
    assert start(tmp_path, FleetOptions(port=2001)).port == 2001
    (line,) = capsys.readouterr().err.splitlines()
    assert "the broker moves from 127.0.0.1:2000 to 127.0.0.1:2001" in line
    assert "edge-agent address" in line
    start(tmp_path, FleetOptions(host="::1"))
    assert "from 127.0.0.1:2001 to [::1]:2001" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_host_to_which_no_device_can_connect_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="not one that devices can connect to"):
        up(tmp_path / "fleet", host=host)
    assert not (tmp_path / "fleet" / "fleet.json").exists()


@pytest.mark.parametrize(
    ("passphrase", "reason"),
    [(b"secret" * 200, "has 1,200 bytes"), (b"secr\xe9t", "is not in UTF-8")],
)
def test_an_unusable_passphrase_is_refused_and_leaves_nothing(
    passphrase: bytes, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEET_CA_PASSPHRASE", os.fsdecode(passphrase))
    config = FleetConfig(host="127.0.0.1", port=1, bundle="/no/bundle")
    for command in (lambda: create_fleet(tmp_path / "fleet", config), lambda: up(tmp_path / "up")):
        with pytest.raises(ConfigError, match=f"^FLEET_CA_PASSPHRASE {reason}") as raised:
            command()
        assert "secr" not in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("metrics_port", "reason"),
    [
        (8883, "and --port has 8883"),
        (8442, "and --service-port has 8443"),
        (65535, "65535 is the l"),
    ],
)
def test_impossible_ports_of_metrics_are_refused_before_anything_is_stored(
    metrics_port: int, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"--metrics-port {metrics_port}: .*{reason}"):
        up(tmp_path / "fleet", metrics_port=metrics_port)
    assert not (tmp_path / "fleet" / "fleet.json").exists()


def test_the_port_of_the_servers_metrics_is_not_that_of_its_broker(tmp_path: Path) -> None:
    config = FleetConfig(host="127.0.0.1", port=18883, bundle="/no/bundle", service_port=18443)
    home = FleetHome.create(tmp_path / "fleet", config)
    for port, option in ((18883, "--port"), (18443, "--service-port")):
        with pytest.raises(ConfigError, match=f"--metrics-port {port}: .*{option} has {port}"):
            server(home.folder, metrics_port=port)


def test_an_api_that_cannot_be_served_is_refused_before_a_fleet_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "fleet"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ConfigError, match="choose another with --api"):
            up(folder, port=free_port(), service_port=0, api=address)
    text = tmp_path / "text.pem"
    text.write_text("no certificate")
    with pytest.raises(ConfigError, match="both in PEM"):
        up(
            folder,
            port=free_port(),
            service_port=0,
            api="127.0.0.1:0",
            api_cert=text,
            api_cert_key=text,
        )
    assert not folder.exists()


def test_a_fleet_of_another_user_is_a_permission_error_and_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, **_: bool) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    start(tmp_path, FleetOptions())
    monkeypatch.setattr(Path, "stat", refuse)  # the modes of files do not bind root
    for command in (FleetHome.load, lambda folder: resolve_config(folder, FleetOptions())):
        with pytest.raises(PermissionError, match=r"fleet\.json"):
            command(tmp_path)


def test_a_second_fleet_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "fleet"
    with hold_folder(folder), pytest.raises(ConfigError, match=r"runs already, as process \d+;"):
        up(folder, bundle=Path("/no/bundle"))
    with hold_folder(folder):
        pass


def test_a_bundle_that_does_not_exist_is_not_written_down(tmp_path: Path) -> None:
    folder = tmp_path / "fleet"
    with pytest.raises(BundleError, match="no usable bundle in /no/bundle"):
        init(host="127.0.0.1", bundle=Path("/no/bundle"), folder=folder)
    with pytest.raises(BundleError, match="no usable bundle in /no/bundle"):
        up(folder, bundle=Path("/no/bundle"), port=1024)
    assert not FleetHome.is_fleet(folder)


def test_a_relative_bundle_is_found_from_everywhere(
    tmp_path: Path, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_bundle.folder.parent)
    relative = Path(tiny_bundle.folder.name)
    init(host="127.0.0.1", bundle=relative, folder=tmp_path / "fleet")
    monkeypatch.chdir(tmp_path)
    assert Path(FleetHome.load(tmp_path / "fleet").config.bundle) == tiny_bundle.folder.resolve()


def test_a_registry_that_is_a_path_does_not_depend_on_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = FleetOptions(bundle="/no/bundle", registry="other.sqlite")
    assert resolve_config(tmp_path, options).registry == str(tmp_path / "other.sqlite")
    options = FleetOptions(bundle="/no/bundle", registry="sqlite:///other.sqlite")
    expected = f"sqlite:///{tmp_path / 'other.sqlite'}"
    assert resolve_config(tmp_path, options).registry == expected


@pytest.mark.parametrize("registry", ["sqlite://", "sqlite:///:memory:"])
def test_a_registry_in_memory_is_refused(tmp_path: Path, registry: str) -> None:
    with pytest.raises(ConfigError, match="in memory and would be lost; name a file"):
        resolve_config(tmp_path, FleetOptions(bundle="/no/bundle", registry=registry))


def test_a_fleet_whose_registry_is_gone_does_not_start_an_empty_one(tmp_path: Path) -> None:
    start(tmp_path, FleetOptions(bundle="/no/bundle"))
    file = tmp_path / REGISTRY_FILE
    file.unlink()
    with pytest.raises(ConfigError, match=r"sqlite is missing or empty; restore a backup"):
        FleetHome.load(tmp_path).registry()
    assert not file.exists()
    file.touch()  # as after a loss of power
    with pytest.raises(ConfigError, match=r"sqlite is missing or empty; restore a backup"):
        FleetHome.load(tmp_path).registry()
    assert not file.stat().st_size


@pytest.mark.parametrize(
    ("registry", "message"),
    [
        ("sqlite:///other.sqlite", r"fleet\.json has the registry 'other\.sqlite': expected a URL"),
        ("other.sqlite", r"other\.sqlite is missing or empty"),
    ],
)
def test_a_registry_that_a_hand_has_written_starts_no_empty_one(
    registry: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "home"
    config = start(folder, FleetOptions(bundle="/no/bundle"))
    FleetHome(folder, msgspec.structs.replace(config, registry=registry)).save()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        FleetHome.load(folder).registry()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize("bundle", ["", "bundle", "~/bundle"])
def test_a_bundle_that_depends_on_the_current_folder_is_refused(
    bundle: str, tmp_path: Path
) -> None:
    start(tmp_path, FleetOptions(bundle="/no/bundle"))
    file = tmp_path / "fleet.json"
    file.write_text(file.read_text().replace("/no/bundle", bundle))
    with pytest.raises(ConfigError, match=rf"has the bundle '{bundle}': expected a whole path"):
        FleetHome.load(tmp_path)


@pytest.mark.parametrize("is_made", [False, True])
def test_an_unusable_registry_leaves_no_folder(
    tmp_path: Path, tiny_bundle: Bundle, is_made: bool
) -> None:
    folder = tmp_path / "fleet"
    if is_made:
        folder.mkdir()
    for registry in ("postgresql://x@127.0.0.1:1/x", "nonsense://x"):
        with pytest.raises(FleetError):
            up(folder, port=1024, bundle=tiny_bundle.folder, registry=registry)
        with pytest.raises(FleetError):
            init(folder=folder, host="127.0.0.1", bundle=tiny_bundle.folder, registry=registry)
    assert [path.name for path in tmp_path.rglob("*")] == (["fleet"] if is_made else [])
