"""`fleet up --broker mosquitto`: a real broker that the server keeps equal to the registry."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import msgspec
import pytest

from benchmarks.whole_model import WholeModel
from fleet.bundles.manifest import Bundle
from fleet.identity.identity import Identity
from fleet.protocol import topics
from fleet.protocol.access import Role
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import PromptRequest
from fleet.protocol.report import DeviceStatus, encode_status
from fleet.server.child_process import child
from fleet.server.home import WORKER, FleetHome
from fleet.transport.mqtt import MqttTransport
from fleet.transport.prompt_client import PromptClient
from tests.brokers import can_connect, free_port, listens, wait_until
from tests.cloud_broker_worker.broker import raw

pytestmark = pytest.mark.mosquitto
WAIT_S = 120.0
OUT_S = 5.0
NUM_TOKENS = 24


class UpFleet:
    """`fleet up --broker mosquitto` as a process; `pids` are those that it prints."""

    def __init__(self, folder: Path, bundle: Bundle, stack: ExitStack) -> None:
        self.port = free_port()
        self.api = f"127.0.0.1:{free_port()}"
        command = (
            "fleet.cli",
            "up",
            "--broker",
            "mosquitto",
            "--home",
            str(folder / "state"),
            "--port",
            str(self.port),
            "--service-port",
            "0",
            "--api",
            self.api,
            "--bundle",
            str(bundle.folder),
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        stack.callback(self.end)
        self.pids = self._pids_until_up()
        self.home = FleetHome.load(folder / "state")

    def _pids_until_up(self) -> list[int]:
        assert self.process.stdout is not None
        killer = threading.Timer(WAIT_S, self.process.kill)
        killer.start()
        pids = []
        for line in self.process.stdout:
            if line.startswith("the fleet is up"):
                break
            pids += [int(pid) for pid in re.findall(r"\(process (\d+)\)", line)]
        killer.cancel()
        return pids

    def enroll(self, name: str, role: Role, folder: Path, allow: tuple[str, ...] = ()) -> Identity:
        return self.home.enroll(name, role, folder / name, allow=allow)

    def ask_over_http(self, body: dict[str, object]) -> str:
        """Return the answer to an app that has only a key."""
        with self.home.registry() as registry:
            key = registry.api_keys.create("notebook", ["gw"])
        request = urllib.request.Request(
            f"http://{self.api}/v1/chat/completions",
            msgspec.json.encode(body),
            {"Authorization": f"Bearer {key}"},
        )
        with urllib.request.urlopen(request, timeout=WAIT_S) as response:
            answer = msgspec.json.decode(response.read())
        return str(answer["choices"][0]["message"]["content"])

    def end(self) -> str:
        """Return its error output, once it has ended."""
        self.process.terminate()
        try:
            return self.process.communicate(timeout=WAIT_S)[1]
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle) -> Iterator[UpFleet]:
    """A fleet that the last test with it ends."""
    with ExitStack() as stack:
        yield UpFleet(tmp_path_factory.mktemp("up"), tiny_bundle, stack)


def test_a_device_that_comes_before_its_rights_is_heard_once_it_has_them(
    fleet: UpFleet, tmp_path: Path
) -> None:
    """Until mosquitto has read the new rights it silently drops the messages of such a device."""
    with MqttTransport.connect(fleet.enroll("early", Role.DEVICE, tmp_path)) as transport:
        status = encode_status(DeviceStatus(online=True, epoch=1))
        transport.on_up(
            lambda: transport.publish(topics.device_status("early"), status, qos=1, retain=True)
        )
        heard = threading.Event()
        transport.subscribe(
            topics.WORKER_STATUS_FILTER, lambda topic, payload: heard.set(), qos=1, retained=True
        )
        assert heard.wait(WAIT_S)
        with fleet.home.registry() as registry:
            wait_until(
                lambda: any(
                    row.device == "early" and row.online for row in registry.stats.devices()
                ),
                "the device's status is in the registry",
                WAIT_S,
            )


def test_a_fleet_with_mosquitto_answers_and_a_revoked_device_is_out_within_five_seconds(
    fleet: UpFleet, tmp_path: Path, tiny_bundle: Bundle
) -> None:
    request = PromptRequest(prompt="How warm is it?", mode=Mode.VERIFIED, max_new_tokens=NUM_TOKENS)
    with ExitStack() as stack:
        device = fleet.enroll("gw", Role.DEVICE, tmp_path)
        app = fleet.enroll("app", Role.APP, tmp_path, allow=("gw",))
        stack.enter_context(
            child("gw", "edge_agent", "run", str(device.folder), "--threads", "1")
        ).wait_ready()
        client = PromptClient(stack.enter_context(MqttTransport.connect(app)))
        replies = list(client.ask("gw", request, timeout_s=WAIT_S))
        tokens = [reply.token_id for reply in replies if reply.token_id is not None]
        assert tokens == WholeModel(tiny_bundle, num_threads=1).generate(
            "How warm is it?", NUM_TOKENS
        )
        body = {
            "model": "fleet",
            "messages": [{"role": "user", "content": "How warm is it?"}],
            "max_tokens": NUM_TOKENS,
            "fleet": {"mode": "verified"},
        }
        assert fleet.ask_over_http(body) == "".join(reply.text for reply in replies)
        with raw.connected(fleet.enroll("thief", Role.DEVICE, tmp_path)) as thief:
            with fleet.home.registry() as registry:
                registry.identities.revoke("thief")
            wait_until(partial(raw.has_ended, thief), "the thief is out", OUT_S)
        assert not can_connect(Identity.load(tmp_path / "thief"))
        assert (
            list(client.ask("gw", request, timeout_s=WAIT_S))[-1].finish_reason
            == replies[-1].finish_reason
        )
        worker = Identity.load(fleet.home.folder / "identities" / WORKER)
        assert worker.config.shared_subscriptions
        fleet.process.terminate()
        assert fleet.process.wait(WAIT_S) == 0
        assert not listens(fleet.port)


def test_a_mosquitto_that_dies_ends_the_fleet_with_a_line_that_names_it(
    tmp_path: Path, tiny_bundle: Bundle
) -> None:
    with ExitStack() as stack:
        fleet = UpFleet(tmp_path, tiny_bundle, stack)
        os.kill(fleet.pids[0], signal.SIGKILL)
        assert fleet.process.wait(WAIT_S) == 1
        assert (
            fleet.end().splitlines()[-1] == "fleet: mosquitto ended with exit status -9; see above"
        )
