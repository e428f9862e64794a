"""Certificates over their life as processes: a late broker, renewal, a pause, another authority."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Final

import pytest

from fleet.bundles.manifest import Bundle
from fleet.errors import LinkError
from fleet.identity.credentials import lifetime
from fleet.identity.identity import CA_FILE, CERT_FILE, Identity
from fleet.protocol.access import Role
from fleet.protocol.prompt import PromptRequest
from fleet.server.child_process import Child, child
from fleet.server.home import COLLECTOR, FleetConfig, FleetHome
from fleet.transport.mqtt import MqttTransport
from fleet.transport.prompt_client import PromptClient
from tests import command_lines
from tests.brokers import HOST, fingerprint_of, free_port, wait_until

WAIT_S: Final = 120.0
DAY_S: Final = 86_400.0
ASKED: Final = PromptRequest(prompt="How warm is it?", max_new_tokens=4)


@pytest.fixture
def home(tmp_path: Path, tiny_bundle: Bundle) -> FleetHome:
    """A fleet whose processes do not run."""
    config = FleetConfig(
        host=HOST, port=free_port(), bundle=str(tiny_bundle.folder), service_port=free_port()
    )
    return FleetHome.create(tmp_path / "state", config)


def command(module: str, *arguments: str) -> str:
    """Run a command to its end; return its output."""
    done = command_lines.run(*arguments, module=module, NO_COLOR="1")
    assert done.returncode == 0, done.stderr
    return done.stdout


def fleet(home: FleetHome, *arguments: str) -> str:
    return command("fleet.cli", *arguments, "--home", str(home.folder))


@contextmanager
def server(home: FleetHome) -> Iterator[Child]:
    with child("the server", "fleet.cli", "server", "--home", str(home.folder)) as process:
        process.wait_ready()
        yield process


def device(folder: Path) -> tuple[str, ...]:
    return ("edge_agent", "run", str(folder), "--threads", "1")


def join(home: FleetHome, name: str, out: Path) -> None:
    printed = fleet(home, "enroll", name).split()
    token = printed[printed.index("join") + 1]
    url = home.address().server
    command("edge_agent", "join", token, "--server", str(url), "--out", str(out))


def answers(home: FleetHome, name: str) -> bool:
    with home.operator() as identity, MqttTransport.connect(identity) as link:
        replies = list(PromptClient(link).ask(name, ASKED, timeout_s=WAIT_S))
    return replies[-1].finish_reason == "length"


def wait_until_answered(home: FleetHome) -> None:
    """Wait until the kitchen answers; the server may be about to load its new certificate."""

    def has_answered() -> bool:
        with suppress(LinkError):
            return answers(home, "kitchen")
        return False

    wait_until(has_answered, "the kitchen answers", WAIT_S)


def wait_until_the_server_trusts(home: FleetHome, pem: str) -> None:
    path = home.folder / "identities" / COLLECTOR / CA_FILE
    wait_until(
        lambda: path.read_text(encoding="utf-8") == pem,
        "the server has renewed the fleet's own certificates",
        WAIT_S,
    )


def expire(home: FleetHome, identity: Identity) -> None:
    """Replace the certificate of an identity by an expired one."""
    config = identity.config
    certificate = home.authority().certify(config.name, config.role, timedelta(minutes=-1))
    with home.registry() as registry:
        registry.identities.recertify(config.name, config.role, certificate.issued)
    certificate.write(identity.folder)


def test_a_device_and_a_worker_that_start_first_wait_for_the_broker(
    home: FleetHome, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    home.enroll("kitchen", Role.DEVICE, tmp_path / "kitchen")
    home.enroll("cloud", Role.WORKER, tmp_path / "cloud")
    worker = ("cloud_broker_worker", "run", str(tmp_path / "cloud"))
    errors = ""

    def have_reported() -> bool:
        nonlocal errors
        errors += capfd.readouterr().err
        return "no connection of kitchen" in errors and "no connection of cloud" in errors

    with child("device", *device(tmp_path / "kitchen")) as kitchen, child("worker", *worker) as up:
        wait_until(have_reported, "both wait for the broker", WAIT_S)
        time.sleep(3)  # several attempts
        assert kitchen.process.poll() is None
        assert up.process.poll() is None
        with server(home):
            assert "serves" in up.wait_ready()
            assert "serves" in kitchen.wait_ready()
            assert answers(home, "kitchen")
    have_reported()
    assert errors.count("no connection of kitchen") == 1
    assert errors.count("no connection of cloud") == 1


def test_a_device_that_waits_ends_when_it_is_stopped(
    home: FleetHome, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    home.enroll("kitchen", Role.DEVICE, tmp_path / "kitchen")
    with child("device", *device(tmp_path / "kitchen")) as kitchen:
        wait_until(lambda: "no connection of kitchen" in capfd.readouterr().err, "it waits", WAIT_S)
        kitchen.request_stop()
        assert kitchen.process.wait(WAIT_S) == 0


def test_the_server_serves_devices_before_a_broker_that_runs_elsewhere(home: FleetHome) -> None:
    options = ("--home", str(home.folder), "--no-broker")
    with child("the server", "fleet.cli", "server", *options) as process:
        assert "service on" in process.wait_ready()
        assert process.process.poll() is None
        with socket.create_connection((HOST, home.config.service_port), WAIT_S):
            pass


def test_a_fleet_starts_after_a_quarter_and_its_devices_are_mended_in_place(
    home: FleetHome, tmp_path: Path
) -> None:
    with server(home):
        join(home, "kitchen", tmp_path / "kitchen")
    (tmp_path / "kitchen" / "agent.json").write_text('{"mode": "standalone"}')
    expire(home, Identity.load(tmp_path / "kitchen"))
    expire(home, home.identity(COLLECTOR, Role.SERVER))
    expire(home, home.identity("operator-1", Role.SERVER))
    with server(home):
        printed = fleet(home, "renew", "kitchen").split()
        token = printed[printed.index("join") + 1]
        url = str(home.address().server)
        out = str(tmp_path / "kitchen")
        command("edge_agent", "join", token, "--server", url, "--out", out)
        with child("device", *device(tmp_path / "kitchen")) as kitchen:
            kitchen.wait_ready()
            assert answers(home, "kitchen")
    assert (tmp_path / "kitchen" / "agent.json").exists()


def test_a_worker_with_a_folder_of_its_own_renews_itself(home: FleetHome, tmp_path: Path) -> None:
    identity = home.enroll("cloud", Role.WORKER, tmp_path / "cloud")
    life = timedelta(seconds=160)  # and five minutes before now: two thirds pass in some seconds
    certificate = home.authority().certify("cloud", Role.WORKER, life)
    with home.registry() as registry:
        registry.identities.recertify("cloud", Role.WORKER, certificate.issued)
    certificate.write(identity.folder)
    with server(home), child("worker", "cloud_broker_worker", "run", str(identity.folder)) as cloud:
        cloud.wait_ready()
        path = identity.folder / CERT_FILE
        wait_until(
            lambda: lifetime(path.read_bytes())[1] > time.time() + 80 * DAY_S,
            "the worker is renewed",
            WAIT_S,
        )
        with home.registry() as registry:
            assert registry.identities.admitted("cloud", fingerprint_of(identity)) is not None
        assert cloud.process.poll() is None


def test_the_authority_is_rotated_and_retired_while_a_device_serves(
    home: FleetHome, tmp_path: Path
) -> None:
    kitchen = tmp_path / "kitchen"
    app = home.enroll("display", Role.APP, tmp_path / "display", allow=())
    with server(home):
        join(home, "kitchen", kitchen)
        old_ca = (kitchen / CA_FILE).read_text()
        with child("device", *device(kitchen)) as process:
            process.wait_ready()
            fleet(home, "authority", "rotate")
            wait_until_the_server_trusts(home, home.trusted_ca())
            wait_until_answered(home)  # the operator has a certificate of the successor
            join(home, "cellar", tmp_path / "cellar")  # a new device trusts both
            refused = command_lines.run("authority", "retire", FLEET_HOME=str(home.folder))
            assert refused.returncode == 1
            assert "display, kitchen" in refused.stderr
        for identity in (kitchen, app.folder):
            command("edge_agent", "renew", str(identity), "--now")
        new_ca = (kitchen / CA_FILE).read_text()
        assert new_ca.startswith(old_ca)
        assert new_ca != old_ca
        with child("device", *device(kitchen)) as process:
            process.wait_ready()
            fleet(home, "authority", "retire")
            wait_until_the_server_trusts(home, home.trusted_ca())
            wait_until_answered(home)
    with server(home), child("device", *device(kitchen)) as process:
        process.wait_ready()
        assert answers(home, "kitchen")
        assert home.authority().pem == new_ca.removeprefix(old_ca)
        command("edge_agent", "renew", str(app.folder), "--now")
        assert (app.folder / CA_FILE).read_text() == home.authority().pem


def test_a_fleet_of_single_components_offers_its_bundle_to_devices(
    home: FleetHome, tmp_path: Path
) -> None:
    with server(home):
        join(home, "kitchen", tmp_path / "kitchen")
        with child("device", *device(tmp_path / "kitchen")) as kitchen:
            kitchen.wait_ready()
            assert answers(home, "kitchen")


def test_a_device_follows_the_server_to_another_address(home: FleetHome, tmp_path: Path) -> None:
    identity = home.enroll("kitchen", Role.DEVICE, tmp_path / "kitchen")
    Identity(identity.folder, identity.config).save()
    port = free_port()
    out = str(identity.folder)
    command("edge_agent", "address", out, "--host", "localhost", "--port", str(port))
    moved = Identity.load(identity.folder).config
    assert (moved.host, moved.port) == ("localhost", port)
    assert moved.server == f"https://localhost:{home.config.service_port}"


def test_two_devices_with_one_identity_are_named_by_the_doctor(
    home: FleetHome, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    home.enroll("kitchen", Role.DEVICE, tmp_path / "kitchen")
    with (
        server(home),
        child("one", *device(tmp_path / "kitchen")) as one,
        child("two", *device(tmp_path / "kitchen")) as two,
    ):
        one.wait_ready()
        two.wait_ready()
        with home.registry() as registry:
            wait_until(
                lambda: bool(registry.audit_log.entries("kitchen", action="shared_identity")),
                "the server has noticed",
                WAIT_S,
            )
    found = command_lines.run("doctor", "--home", str(home.folder))
    assert "two processes use the identity of kitchen" in found.stdout
    assert "two processes use the identity of kitchen" in capfd.readouterr().err
