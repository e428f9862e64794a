"""`fleet up` with several workers: they share the devices, and one may stop."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from benchmarks.whole_model import WholeModel
from cloud_broker_worker.broker.mosquitto import write_config
from fleet.bundles.manifest import Bundle
from fleet.protocol.access import Role
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import PromptRequest, Reply
from fleet.server.child_process import Child, child
from fleet.server.home import COLLECTOR, FleetConfig, FleetHome
from fleet.transport.mqtt import MqttTransport
from fleet.transport.prompt_client import PromptClient
from tests.brokers import HOST, find_mosquitto, free_port, listens, wait_until
from tests.scrape import get, scrape

WAIT_S = 120.0
NUM_TOKENS = 48
MANY_TOKENS = 300  # of an answer that goes on for longer than it takes to stop its device


@dataclass
class Told:
    """The line that `fleet up` prints for one of its processes."""

    pid: int
    url: str


class UpFleet:
    """`fleet up --workers 2`, one device, and an app that asks it."""

    def __init__(self, folder: Path, bundle: Bundle, stack: ExitStack) -> None:
        state = folder / "state"
        command = (
            "fleet.cli",
            "up",
            "--home",
            str(state),
            "--port",
            str(free_port()),
            "--bundle",
            str(bundle.folder),
            "--workers",
            "2",
            "--metrics-port",
            "0",
            "--service-port",
            "0",
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        stack.callback(end, self.process)
        lines = self._lines_until_up()
        told = [re.search(r"metrics on (\S+) \(process (\d+)\)", line) for line in lines]
        self.server, *self.workers = [Told(int(found[2]), found[1]) for found in told if found]
        fleet = FleetHome.load(state)
        device, app = (
            fleet.enroll(name, role, folder / name, allow=allow)
            for name, role, allow in (
                ("gw", Role.DEVICE, ()),
                ("app", Role.APP, ("gw",)),
            )
        )
        self.device: Child = stack.enter_context(
            child("gw", "edge_agent", "run", str(device.folder), "--threads", "1")
        )
        self.device.wait_ready()
        self._client = PromptClient(stack.enter_context(MqttTransport.connect(app)))

    def _lines_until_up(self) -> list[str]:
        assert self.process.stdout is not None
        killer = threading.Timer(WAIT_S, self.process.kill)
        killer.start()
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if line.startswith("the fleet is up"):
                break
        killer.cancel()
        return lines

    def ask(self, prompt: str, max_new_tokens: int = NUM_TOKENS) -> Iterator[Reply]:
        request = PromptRequest(prompt=prompt, mode=Mode.VERIFIED, max_new_tokens=max_new_tokens)
        return self._client.ask("gw", request, timeout_s=WAIT_S)


def is_ready(url: str) -> bool:
    return get(f"{url}/readyz") == (200, "ok\n")


def end(process: subprocess.Popen[str]) -> str:
    """Return its error output, once it has ended."""
    process.terminate()
    try:
        return process.communicate(timeout=WAIT_S)[1]
    finally:
        process.kill()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle) -> Iterator[UpFleet]:
    """A fleet that the last test with it ends."""
    with ExitStack() as stack:
        yield UpFleet(tmp_path_factory.mktemp("up"), tiny_bundle, stack)


def token_ids(replies: list[Reply]) -> list[int]:
    return [reply.token_id for reply in replies if reply.token_id is not None]


def test_two_workers_serve_and_each_process_tells_of_itself(
    fleet: UpFleet, tiny_bundle: Bundle
) -> None:
    replies = list(fleet.ask("How warm is it?"))
    assert token_ids(replies) == WholeModel(tiny_bundle, num_threads=1).generate(
        "How warm is it?", NUM_TOKENS
    )
    for told in (fleet.server, *fleet.workers):
        assert get(f"{told.url}/healthz") == get(f"{told.url}/readyz") == (200, "ok\n")
    online = 'fleet_devices{group="",state="online"}'
    wait_until(
        lambda: scrape(fleet.server.url)['fleet_reports_total{outcome="stored"}'] == 1,
        "the report is in",
    )
    assert scrape(fleet.server.url)[online] == 1
    assert sum(verdicts(fleet.workers)) >= 1


def verdicts(workers: list[Told]) -> list[float]:
    """Return how many verify requests each worker has answered."""
    return [
        scrape(told.url)['fleet_worker_answer_seconds_count{kind="verify"}'] for told in workers
    ]


def test_a_stopped_worker_drains_while_the_other_serves_and_a_dead_last_one_is_named(
    fleet: UpFleet, tiny_bundle: Bundle
) -> None:
    prompt = "Tell me about rivers."
    before = verdicts(fleet.workers)  # either may keep the session of an earlier answer
    answer = fleet.ask(prompt, MANY_TOKENS)
    replies = [next(answer) for _ in range(3)]
    fleet.device.process.send_signal(
        signal.SIGSTOP
    )  # so that the answer does not end before the worker does
    wait_until(lambda: verdicts(fleet.workers) != before, "one of the two serves it", WAIT_S)
    serves = [now > then for now, then in zip(verdicts(fleet.workers), before, strict=True)]
    leaving = fleet.workers[serves.index(True)]
    staying = fleet.workers[serves.index(False)]
    os.kill(leaving.pid, signal.SIGTERM)
    wait_until(
        lambda: get(f"{leaving.url}/readyz") == (503, "the worker is draining\n"),
        "it drains",
        WAIT_S,
    )
    assert get(f"{staying.url}/readyz") == (200, "ok\n")
    fleet.device.process.send_signal(signal.SIGCONT)
    replies += answer
    assert token_ids(replies) == WholeModel(tiny_bundle, num_threads=1).generate(
        prompt, MANY_TOKENS
    )
    assert replies[-1].note is not None, "the answer ended before its worker left"
    wait_until(lambda: not is_alive(leaving.pid), "it has left", WAIT_S)
    os.kill(staying.pid, signal.SIGKILL)
    assert fleet.process.wait(WAIT_S) == 1
    left, died = [
        line for line in end(fleet.process).splitlines() if line.startswith("fleet: worker")
    ]
    assert re.fullmatch(
        r"fleet: worker worker-\d ended with exit status 0; 1 of 2 workers continue", left
    )
    assert re.fullmatch(r"fleet: worker worker-\d ended with exit status -9; see above", died)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def fleet_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fleet.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)


@pytest.mark.mosquitto
def test_parts_that_are_started_one_by_one_meet_at_a_broker_that_runs_elsewhere(
    tmp_path: Path, tiny_bundle: Bundle
) -> None:
    where = ("--home", str(tmp_path / "state"))
    port = free_port()
    made = fleet_command(
        "init",
        "--host",
        HOST,
        "--port",
        str(port),
        "--service-port",
        "0",
        "--bundle",
        str(tiny_bundle.folder),
        *where,
    )
    assert made.returncode == 0, made.stderr
    out = ("--role", "worker", "--shared-subscriptions", "--out", str(tmp_path / "w1"))
    assert fleet_command("enroll", "w1", *out, *where).returncode == 0
    fleet = FleetHome.load(tmp_path / "state")
    with fleet.registry() as registry:
        grants = [
            granted for name in ("w1", COLLECTOR) if (granted := registry.identities.grants(name))
        ]
    config = write_config(tmp_path / "mosquitto", port, fleet.server_tls(), grants)
    with ExitStack() as stack:
        broker = subprocess.Popen([find_mosquitto("mosquitto"), "-c", str(config)])
        stack.callback(broker.wait, WAIT_S)
        stack.callback(broker.terminate)
        wait_until(lambda: listens(port), "mosquitto listens")
        metrics = ("--metrics-port", "0")
        parts = (
            ("fleet.cli", "server", "--no-broker", *where, *metrics),
            ("cloud_broker_worker", "run", str(tmp_path / "w1"), *metrics),
        )
        for part in [stack.enter_context(child(arguments[0], *arguments)) for arguments in parts]:
            found = re.search(r"metrics on (\S+)", part.wait_ready(WAIT_S))
            assert found
            url = found[1]
            wait_until(partial(is_ready, url), "it is ready", WAIT_S)


def test_only_a_worker_shares_a_subscription(tmp_path: Path) -> None:
    home = FleetHome.create(tmp_path / "state", FleetConfig(host=HOST, port=1, bundle="/no/bundle"))
    refused = fleet_command("enroll", "d1", "--shared-subscriptions", "--home", str(home.folder))
    assert refused.returncode == 1
    assert "only a worker shares a subscription" in refused.stderr
