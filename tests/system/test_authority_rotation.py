"""The rotation of the authority of a fleet with mosquitto, with an answer at each of its steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from fleet.bundles.manifest import Bundle
from fleet.identity.identity import CA_FILE
from fleet.protocol.prompt import PromptRequest
from fleet.server.child_process import Child, child
from fleet.server.home import MOSQUITTO, WORKER, FleetConfig, FleetHome
from fleet.server.mosquitto import start_mosquitto
from fleet.server.supervisor import worker_folder
from fleet.transport.mqtt import MqttTransport
from fleet.transport.prompt_client import PromptClient
from tests.brokers import HOST, find_mosquitto, free_port, wait_until
from tests.system.test_certificate_life import command, device, fleet, join

pytestmark = pytest.mark.mosquitto

WAIT_S: Final = 120.0
ASKED: Final = PromptRequest(prompt="How warm is it?", max_new_tokens=4, threshold=1.0)


class Mosquitto:
    """The mosquitto of a fleet, which its operator starts again."""

    def __init__(self, home: FleetHome) -> None:
        self._home = home
        self._process = self._start()

    def _start(self) -> Child:
        return start_mosquitto(self._home, self._home.folder / MOSQUITTO)

    def start_again(self) -> None:
        self._process.stop()
        self._process = self._start()

    def stop(self) -> None:
        self._process.stop()


@pytest.fixture
def home(tmp_path: Path, tiny_bundle: Bundle) -> FleetHome:
    bundle = str(tiny_bundle.folder)
    config = FleetConfig(host=HOST, port=free_port(), bundle=bundle, service_port=free_port())
    return FleetHome.create(tmp_path / "state", config)


@pytest.fixture
def broker(home: FleetHome) -> Iterator[Mosquitto]:
    find_mosquitto("mosquitto")
    worker_folder(home, WORKER, shares=True)
    running = Mosquitto(home)
    yield running
    running.stop()


@contextmanager
def server(home: FleetHome) -> Iterator[None]:
    options = ("--no-broker", "--mosquitto", str(home.folder / MOSQUITTO))
    with child(
        "the server", "fleet.cli", "server", "--home", str(home.folder), *options
    ) as process:
        process.wait_ready()
        yield


def answered_by(home: FleetHome) -> dict[str, int]:
    """Ask the device for tokens that only the worker can choose; return their sources."""
    with home.operator() as identity, MqttTransport.connect(identity) as link:
        usage = list(PromptClient(link).ask("kitchen", ASKED, timeout_s=WAIT_S))[-1].usage
    return usage.sources if usage else {}


def wait_until_answered(home: FleetHome) -> None:
    """Wait until device, worker and server are connected to a broker that has started again."""
    wait_until(lambda: answered_by(home) == {"cloud": 4}, "the worker answers", WAIT_S)


def trusts(folder: Path, pem: str) -> bool:
    return (folder / CA_FILE).read_text(encoding="utf-8") == pem


def test_a_fleet_with_mosquitto_answers_before_within_and_after_a_rotation(
    home: FleetHome, broker: Mosquitto, tmp_path: Path
) -> None:
    kitchen = tmp_path / "kitchen"
    worker = home.folder / "identities" / WORKER
    old_ca = home.trusted_ca()
    with server(home):
        join(home, "kitchen", kitchen)
        with (
            child("worker", "cloud_broker_worker", "run", str(worker), "--threads", "1") as cloud,
            child("device", *device(kitchen)) as edge,
        ):
            cloud.wait_ready()
            edge.wait_ready()
            wait_until_answered(home)

            fleet(home, "authority", "rotate")
            both = home.trusted_ca()
            wait_until(
                lambda: trusts(home.folder / MOSQUITTO, both) and trusts(worker, both),
                "the server has renewed the fleet's own certificates",
                WAIT_S,
            )
            broker.start_again()
            assert trusts(kitchen, old_ca)
            wait_until_answered(home)

            command("edge_agent", "renew", str(kitchen), "--now")
            assert trusts(kitchen, both)
            fleet(home, "authority", "retire")
            new = both.removeprefix(old_ca)
            wait_until(
                lambda: trusts(home.folder / MOSQUITTO, new) and trusts(worker, new),
                "the server has renewed the fleet's own certificates again",
                WAIT_S,
            )
            broker.start_again()
            wait_until_answered(home)
            assert home.trusted_ca() == new
