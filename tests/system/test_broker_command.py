"""`fleet broker`: files for a mosquitto that is started by hand, and rights for other brokers."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from fleet.identity.identity import Identity
from fleet.protocol.access import Role
from fleet.server.child_process import child
from fleet.server.home import FleetConfig, FleetHome
from tests import command_lines
from tests.brokers import HOST, can_connect, find_mosquitto, free_port, listens, wait_until

WAIT_S = 60.0


@pytest.fixture
def home(tmp_path: Path) -> FleetHome:
    """A fleet that nothing of runs, with the device `gw` and the app `app`, which may prompt it."""
    made = FleetHome.create(
        tmp_path / "state",
        FleetConfig(host=HOST, port=free_port(), bundle=str(tmp_path), service_port=0),
    )
    for name, role, allow in (("gw", Role.DEVICE, ()), ("app", Role.APP, ("gw",))):
        made.enroll(name, role, tmp_path / name, allow=allow)
    return made


@contextmanager
def mosquitto(config: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([find_mosquitto("mosquitto"), "-c", str(config)])
    try:
        wait_until(lambda: listens(port), "mosquitto listens")
        yield process
    finally:
        process.terminate()
        process.wait(WAIT_S)


def test_all_rights_in_the_format_of_emqx(home: FleetHome) -> None:
    lines = command_lines.run(
        "broker", "rules", "--format", "emqx", "--home", str(home.folder)
    ).stdout.splitlines()
    published = '"ce/v1/d/gw/prompt/app/+", "ce/v1/d/gw/cancel/app/+", "ce/v1/e/app/+"'
    assert f'{{allow, {{username, "app"}}, publish, [{published}]}}.' in lines
    subscribed = '"ce/v1/d/+/reply/app/+", "ce/v1/d/gw/status"'
    assert f'{{allow, {{username, "app"}}, subscribe, [{subscribed}]}}.' in lines
    assert lines[-1] == "{deny, all}."


def test_all_rights_as_json(home: FleetHome) -> None:
    rights = json.loads(
        command_lines.run("broker", "rules", "--format", "json", "--home", str(home.folder)).stdout
    )
    (app,) = (each for each in rights if each["name"] == "app")
    assert app["role"] == "app"
    assert app["subscribe"] == ["ce/v1/d/+/reply/app/+", "ce/v1/d/gw/status"]


def test_an_unknown_format_is_refused(home: FleetHome) -> None:
    refused = command_lines.run("broker", "rules", "--format", "hivemq", "--home", str(home.folder))
    assert refused.returncode == 1
    assert "expected one of mosquitto, emqx, json" in refused.stderr


@pytest.mark.mosquitto
def test_a_mosquitto_that_was_started_by_hand_follows_the_command_and_a_signal(
    home: FleetHome, tmp_path: Path
) -> None:
    out = tmp_path / "mosquitto"
    device = Identity.load(tmp_path / "gw")
    write = ("broker", "config", "--out", str(out), "--home", str(home.folder))
    assert command_lines.run(*write).returncode == 0
    assert "kill -HUP" in (out / "README").read_text()
    with mosquitto(out / "mosquitto.conf", home.config.port) as process:
        assert can_connect(device)
        with home.registry() as registry:
            registry.identities.revoke("gw")
        assert command_lines.run(*write).returncode == 0
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: not can_connect(device), "it is refused", WAIT_S)


@pytest.mark.mosquitto
def test_a_server_beside_a_mosquitto_keeps_it_in_step(home: FleetHome, tmp_path: Path) -> None:
    out = tmp_path / "mosquitto"
    device = Identity.load(tmp_path / "gw")
    where = ("--home", str(home.folder))
    assert command_lines.run("broker", "config", "--out", str(out), *where).returncode == 0
    with ExitStack() as stack:
        stack.enter_context(mosquitto(out / "mosquitto.conf", home.config.port))
        server = ("fleet.cli", "server", "--no-broker", "--mosquitto", str(out), *where)
        stack.enter_context(child("the server", *server)).wait_ready()
        assert can_connect(device)
        with home.registry() as registry:
            registry.identities.revoke("gw")
        wait_until(lambda: not can_connect(device), "it is refused", WAIT_S)


def test_a_mosquitto_beside_the_embedded_broker_is_refused(home: FleetHome, tmp_path: Path) -> None:
    refused = command_lines.run("server", "--mosquitto", str(tmp_path), "--home", str(home.folder))
    assert refused.returncode == 1
    assert "add --no-broker" in refused.stderr
