"""Updates of a device's software, with real wheels and processes, from adding to confirming."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from edge_agent.state.software_slots import SOFTWARE_FILE, SoftwareSlots
from fleet.bundles.manifest import Bundle
from fleet.bundles.signature import write_signature
from fleet.identity.identity import Identity
from fleet.protocol.access import Role
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import PromptRequest
from fleet.registry.results import DeviceRow
from fleet.server.child_process import Child
from fleet.server.home import FleetConfig, FleetHome
from fleet.transport.mqtt import MqttTransport
from fleet.transport.prompt_client import PromptClient
from fleet.version import __version__
from tests import command_lines
from tests.brokers import HOST, free_port, wait_until
from tests.wheels import build_wheel

pytestmark = pytest.mark.timeout(600)

ROOT: Final = Path(__file__).parents[2]
WAIT_S: Final = 150.0
TRIAL_S: Final = 120.0
HANG_S: Final = 10.0  # of the trial of a version that hangs
CRASH: Final = "raise RuntimeError('this version cannot be imported')\n"
HANG: Final = "import time\ntime.sleep(3600)\n"
# A version that ends at once, as in a power cut, together with its launcher.
POWER_CUT: Final = "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos._exit(1)\n"
CLI: Final = "edge_agent/cli.py"


class UpdatableFleet:
    """A server in a process, and the devices of its folder."""

    def __init__(self, folder: Path, bundle: Bundle, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        self._bundle = bundle
        config = FleetConfig(
            host=HOST, port=free_port(), bundle=str(bundle.folder), service_port=free_port()
        )
        self.home = FleetHome.create(folder / "home", config)
        self.start("fleet.cli", "server", "--home", str(self.home.folder))

    def start(self, *arguments: str) -> Child:
        """Start a process; it is stopped at the end."""
        child = Child(arguments[0], arguments)
        self._stack.callback(child.stop)
        child.wait_ready()
        return child

    def enroll(self, name: str, group: str | None = None, *, trial_s: float = TRIAL_S) -> Path:
        """Enrol a device whose trials take at most `trial_s`; return its identity folder."""
        out = self.folder / name
        self.home.enroll(name, Role.DEVICE, out, group=group)
        settings = {"update_timeout_s": trial_s, "num_threads": 1, "mode": "standalone"}
        (out / "agent.json").write_text(json.dumps(settings))
        return out

    def run_device(self, name: str) -> Child:
        """Start a device and wait until it serves."""
        return self.start("edge_agent", "run", str(self.folder / name))

    def fleet(self, *words: str) -> str:
        """Return the output of a command of `fleet`; it must succeed."""
        done = self.attempt(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def attempt(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Return the result of a command of `fleet`."""
        return command_lines.run(*words, FLEET_HOME=str(self.home.folder), NO_COLOR="1")

    def row(self, name: str) -> DeviceRow:
        """Return a device as the registry knows it."""
        with self.home.registry() as registry:
            return registry.stats.device(name)

    def wait(self, name: str, is_it: Callable[[DeviceRow], bool], what: str) -> DeviceRow:
        """Wait until a device satisfies a condition."""
        wait_until(lambda: is_it(self.row(name)), f"{name} {what}", WAIT_S)
        return self.row(name)

    def wait_version(self, name: str, version: str) -> DeviceRow:
        """Wait until a device is online with a version."""
        return self.wait(name, lambda row: row.online and row.version == version, f"runs {version}")

    def wait_problem(self, name: str, text: str) -> DeviceRow:
        """Wait until a device is online with a problem of its software, with the own version."""
        return self.wait(
            name,
            lambda row: (
                row.online
                and row.version == __version__
                and row.software_error is not None
                and text in row.software_error.message
            ),
            f"reports {text!r}",
        )

    def slots(self, name: str) -> SoftwareSlots:
        """Return the slots of a device."""
        data = (self.folder / name / SOFTWARE_FILE).read_bytes()
        return msgspec.json.decode(data, type=SoftwareSlots)


@pytest.fixture
def fleet(
    tmp_path: Path, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> Iterator[UpdatableFleet]:
    monkeypatch.chdir(ROOT)
    with ExitStack() as stack:
        yield UpdatableFleet(tmp_path, tiny_bundle, stack)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this tree with a higher version."""
    return build_wheel(tmp_path_factory.mktemp("wheel"), "0.9.0")


def answers(fleet: UpdatableFleet, name: str) -> bool:
    """Whether a device answers a prompt."""
    app = fleet.folder / "app"
    if not app.exists():
        fleet.home.enroll("app", Role.APP, app, allow=(name,))
    request = PromptRequest(prompt="How warm is it?", mode=Mode.STANDALONE, max_new_tokens=4)
    with MqttTransport.connect(Identity.load(app)) as link:
        *_, last = PromptClient(link).ask(name, request, WAIT_S)
    return last.usage is not None


def test_a_device_updates_itself_and_keeps_the_version_over_a_restart(
    fleet: UpdatableFleet, good: Path
) -> None:
    fleet.enroll("kitchen")
    device = fleet.run_device("kitchen")
    fleet.wait_version("kitchen", __version__)
    assert "version 0.9.0 is offered" in fleet.fleet("update", "add", str(good))
    fleet.fleet("update", "rollout", "0.9.0", "kitchen")
    fleet.wait_version("kitchen", "0.9.0")
    wait_until(lambda: fleet.slots("kitchen").current == "0.9.0", "the trial is confirmed", WAIT_S)
    assert answers(fleet, "kitchen")
    (row,) = json.loads(fleet.fleet("update", "status", "--json"))
    assert (row["version"], row["desired"], row["state"]) == ("0.9.0", "0.9.0", "current")

    device.stop()
    fleet.wait("kitchen", lambda row: not row.online, "is offline")
    fleet.run_device("kitchen")
    fleet.wait_version("kitchen", "0.9.0")
    assert fleet.slots("kitchen").current == "0.9.0"


@pytest.mark.parametrize(
    ("prefixes", "problem"),
    [
        ({CLI: CRASH}, "ended with status 1"),
        ({CLI: HANG}, f"did not report within {HANG_S:g} s"),
        ({"edge_agent/serving/self_test.py": CRASH}, "ended with status 1"),
    ],
    ids=["crashes at import", "hangs", "fails its self-test"],
)
def test_a_device_returns_to_the_version_before_one_that(
    fleet: UpdatableFleet, tmp_path: Path, prefixes: dict[str, str], problem: str
) -> None:
    fleet.enroll("kitchen", trial_s=HANG_S if HANG in prefixes.values() else TRIAL_S)
    fleet.run_device("kitchen")
    wheel = build_wheel(tmp_path, "0.9.1", prefixes=prefixes)
    fleet.fleet("update", "add", str(wheel))
    fleet.fleet("update", "rollout", "0.9.1", "kitchen")
    row = fleet.wait_problem("kitchen", problem)
    assert row.software_error
    assert row.software_error.is_final
    assert "version 0.9.1 is abandoned" in row.software_error.message
    assert answers(fleet, "kitchen")
    refused = fleet.attempt("update", "rollout", "0.9.1", "--all")
    assert refused.returncode == 1
    assert "kitchen does not run version 0.9.1" in refused.stderr


def test_a_trial_in_which_the_power_fails_every_time_ends_after_three_starts(
    fleet: UpdatableFleet, tmp_path: Path
) -> None:
    folder = fleet.enroll("kitchen")
    device = fleet.run_device("kitchen")
    fleet.fleet("update", "add", str(build_wheel(tmp_path, "0.9.2", prefixes={CLI: POWER_CUT})))
    fleet.fleet("update", "rollout", "0.9.2", "kitchen")
    statuses = [device.process.wait(WAIT_S)]
    for _ in range(2):
        command = [sys.executable, "-m", "edge_agent", "run", str(folder)]
        statuses.append(subprocess.run(command, timeout=WAIT_S, check=False).returncode)
    assert statuses == [-signal.SIGKILL] * 3
    fleet.run_device("kitchen")
    fleet.wait_problem("kitchen", "it was started 3 times and did not report")


def test_a_version_that_another_key_signed_is_not_installed(
    fleet: UpdatableFleet, good: Path
) -> None:
    folder = fleet.enroll("kitchen")
    fleet.run_device("kitchen")
    fleet.fleet("update", "add", str(good))
    write_signature(fleet.home.software / "0.9.0", ec.generate_private_key(ec.SECP256R1()))
    fleet.fleet("update", "rollout", "0.9.0", "kitchen")
    fleet.wait_problem("kitchen", "is not signed by this fleet")
    assert not (folder / "software" / "0.9.0").exists()


def test_a_version_whose_requirements_the_environment_does_not_meet_is_not_installed(
    fleet: UpdatableFleet, tmp_path: Path
) -> None:
    folder = fleet.enroll("kitchen")
    fleet.run_device("kitchen")
    fleet.fleet("update", "add", str(build_wheel(tmp_path, "0.9.3", requires="msgspec>=99")))
    fleet.fleet("update", "rollout", "0.9.3", "kitchen")
    row = fleet.wait_problem("kitchen", "needs msgspec>=99")
    assert row.software_error
    assert "is installed" in row.software_error.message
    assert not (folder / SOFTWARE_FILE).exists()


def test_a_version_goes_to_one_group_first_then_to_all_and_back(
    fleet: UpdatableFleet, good: Path
) -> None:
    fleet.enroll("kitchen", "canary")
    fleet.enroll("hall")
    fleet.run_device("kitchen")
    fleet.run_device("hall")
    fleet.fleet("update", "add", str(good))
    early = fleet.attempt("update", "rollout", "0.9.0", "--all")
    assert early.returncode == 1
    assert "no device runs version 0.9.0 yet" in early.stderr
    fleet.fleet("update", "rollout", "0.9.0", "--group", "canary")
    fleet.wait_version("kitchen", "0.9.0")
    assert fleet.row("hall").version == __version__
    fleet.fleet("update", "rollout", "0.9.0", "--all")
    fleet.wait_version("hall", "0.9.0")

    fleet.fleet("config", "set", "--all", f"software={__version__}")
    fleet.wait_version("hall", __version__)
    fleet.wait_version("kitchen", __version__)


def test_a_device_stops_when_its_launcher_is_killed(fleet: UpdatableFleet, good: Path) -> None:
    fleet.enroll("kitchen")
    device = fleet.run_device("kitchen")
    fleet.fleet("update", "add", str(good))
    fleet.fleet("update", "rollout", "0.9.0", "kitchen")
    fleet.wait_version("kitchen", "0.9.0")
    device.process.kill()
    fleet.wait("kitchen", lambda row: not row.online, "is offline")
