"""Every example works as described, on a running fleet."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from queue import Empty, SimpleQueue

import msgspec
import pytest

from fleet.bundles.manifest import Bundle
from fleet.identity.identity import Identity
from fleet.protocol import topics
from fleet.protocol.access import Role
from fleet.protocol.prompt import Reply, decode_reply
from fleet.protocol.report import DeviceStatus, encode_status
from fleet.server.child_process import Child, child
from fleet.server.home import FleetConfig, FleetHome
from fleet.transport.mqtt import MqttTransport
from tests.brokers import HOST, Inbox, find_mosquitto, free_port, wait_until

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
TRIGGERS = EXAMPLES / "triggers.json"
TIMEOUT_S = 120.0


class Home:
    """A fleet of one device, `kitchen`, that has the example's triggers; a sensor and a display."""

    def __init__(self, folder: Path, bundle: Bundle, stack: ExitStack) -> None:
        self.folder = folder
        config = FleetConfig(
            host=HOST, port=free_port(), bundle=str(bundle.folder), service_port=free_port()
        )
        self.fleet_home = FleetHome.create(folder / "state", config)
        self._start(
            stack,
            "fleet.cli",
            "up",
            "--home",
            str(self.fleet_home.folder),
            "--port",
            str(self.port),
            "--service-port",
            str(config.service_port),
            "--bundle",
            str(bundle.folder),
        )
        self.fleet_home.enroll("kitchen", Role.DEVICE, folder / "kitchen")
        for app in ("thermostat", "display"):
            self.fleet_home.enroll(app, Role.APP, folder / app, allow=("kitchen",))
        self._start(stack, "edge_agent", "run", str(folder / "kitchen"), "--threads", "1")
        wait_until(self._is_online, "kitchen is online", TIMEOUT_S)
        self.run("fleet", "config", "set", "kitchen", f"triggers=@{TRIGGERS}", "max_new_tokens=8")
        wait_until(self._follows, "kitchen follows its configuration", TIMEOUT_S)

    @property
    def port(self) -> int:
        return self.fleet_home.config.port

    def _start(self, stack: ExitStack, *arguments: str) -> None:
        child = Child(arguments[0], arguments)
        stack.callback(child.stop)
        child.wait_ready()

    def _is_online(self) -> bool:
        with self.fleet_home.registry() as registry:
            return registry.stats.devices()[0].online

    def _follows(self) -> bool:
        with self.fleet_home.registry() as registry:
            wanted = registry.desired_state.configs(["kitchen"])["kitchen"].version
            return registry.stats.devices()[0].config_version == wanted

    def run(
        self, *words: str, text: str = "", folder: Path | None = None, expected_status: int = 0
    ) -> str:
        """Return the output of a command in a folder with the identities' folders."""
        programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        done = subprocess.run(
            words,
            input=text,
            cwd=folder or self.folder,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
            env=os.environ
            | {"PATH": programs, "FLEET_HOME": str(self.fleet_home.folder), "NO_COLOR": "1"},
        )
        assert done.returncode == expected_status, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle) -> Iterator[Home]:
    with ExitStack() as stack:
        yield Home(tmp_path_factory.mktemp("home"), tiny_bundle, stack)


@pytest.mark.mosquitto
def test_a_warm_kitchen_makes_the_device_talk_to_the_display(home: Home) -> None:
    find_mosquitto("mosquitto_pub")
    replies: SimpleQueue[tuple[str, Reply]] = SimpleQueue()
    with MqttTransport.connect(Identity.load(home.folder / "display")) as display:
        display.subscribe(
            topics.device_reply("kitchen", "display", "+"),
            lambda topic, payload: replies.put((topic.rsplit("/", 1)[1], decode_reply(payload))),
            qos=1,
        )
        home.run(
            "sh",
            str(EXAMPLES / "sensor.sh"),
            "thermostat",
            HOST,
            str(home.port),
            text="21.5\nbroken\n31.27\n40\n",
        )
        answer = [replies.get(timeout=TIMEOUT_S)]
        while not answer[-1][1].done:
            answer.append(replies.get(timeout=TIMEOUT_S))
        with pytest.raises(Empty):  # 21.5 is not warm, and 40 came within a minute of 31.27
            replies.get(timeout=1.0)
    assert {request.rsplit("-", 2)[0] for request, _ in answer} == {"too-warm"}
    assert len({request for request, _ in answer}) == 1
    assert answer[-1][1].usage is not None
    with home.fleet_home.registry() as registry:
        wait_until(
            lambda: registry.stats.per_device("kitchen")[0].generations >= 1,
            "the registry counts the answer",
            TIMEOUT_S,
        )


def test_an_app_with_nothing_but_paho_prints_an_answer(home: Home) -> None:
    printed = home.run(
        sys.executable, str(EXAMPLES / "app.py"), "display", "kitchen", "How warm is it?"
    )
    text, counts = printed.rsplit("\n", 2)[:2]
    assert text
    assert sum(msgspec.json.decode(counts.replace("'", '"')).values()) > 0


def test_the_app_ends_with_a_clear_line_when_the_device_is_offline_or_not_allowed(
    home: Home,
) -> None:
    home.fleet_home.enroll("lounge", Role.DEVICE, home.folder / "lounge")
    home.run("fleet", "allow", "display", "lounge")
    ask = [sys.executable, str(EXAMPLES / "app.py"), "display"]
    with child("lounge", "edge_agent", "run", str(home.folder / "lounge")) as lounge:
        lounge.wait_ready()
    printed = home.run(*ask, "lounge", "Hello?", expected_status=1)
    assert printed == "lounge is offline; try again when it is back\n"
    printed = home.run(*ask, "cellar", "Hello?", expected_status=1)
    assert printed.startswith("nothing came from cellar")


def test_the_request_of_an_app_that_is_killed_is_cancelled(home: Home) -> None:
    inbox = Inbox()
    home.fleet_home.enroll("pantry", Role.DEVICE, home.folder / "pantry")
    home.run("fleet", "allow", "display", "pantry")
    with MqttTransport.connect(Identity.load(home.folder / "pantry")) as pantry:
        for topic_filter in (topics.prompts_to("pantry"), topics.cancels_to("pantry")):
            pantry.subscribe(topic_filter, inbox, qos=1)
        online = encode_status(DeviceStatus(online=True, epoch=1))
        pantry.publish(topics.device_status("pantry"), online, qos=1, retain=True)
        ask = [sys.executable, str(EXAMPLES / "app.py"), "display", "pantry", "Hello?"]
        with subprocess.Popen(ask, cwd=home.folder) as app:
            request = inbox.get(TIMEOUT_S)[0].rsplit("/", 1)[1]
            app.kill()
        assert inbox.get() == (topics.device_cancel("pantry", "display", request), b"")


def test_the_app_is_one_that_needs_no_library_of_ours() -> None:
    source = (EXAMPLES / "app.py").read_text(encoding="utf-8")
    imported = [
        line.split()[1] for line in source.splitlines() if line.startswith(("import", "from"))
    ]
    assert imported == ["json", "queue", "sys", "uuid", "pathlib", "paho.mqtt.client"]


def test_an_operators_session_goes_through(home: Home, tmp_path: Path) -> None:
    printed = home.run("sh", str(EXAMPLES / "operator.sh"), folder=tmp_path)
    assert "tablet may prompt floor=1" in printed
    assert "tablet may prompt no device" in printed
    assert "kitchen has floor=1\n" in printed
    with home.fleet_home.registry() as registry:
        assert [row.action for row in registry.audit_log.entries("tablet")[:2]] == [
            "disallow",
            "allow",
        ]


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.iterdir()))
def test_every_example_is_listed_in_the_guide_and_run_by_a_test(example: str) -> None:
    assert f"(../examples/{example})" in (ROOT / "docs/operator-guide.md").read_text(
        encoding="utf-8"
    )
    tests = [*Path(__file__).parent.glob("test_*.py"), ROOT / "tests/api/test_clients.py"]
    run = "".join(path.read_text(encoding="utf-8") for path in tests)
    assert f'EXAMPLES / "{example}"' in run
