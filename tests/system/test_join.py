"""`edge-agent join` and `run` as processes, with a token, the service and a real broker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest

from fleet.bundles.manifest import Bundle, Manifest
from fleet.protocol import topics
from fleet.protocol.desired_config import DesiredConfig, Settings, encode_desired
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import PromptRequest
from fleet.protocol.report import DeviceStatus, decode_status
from fleet.transport.mqtt import MqttTransport
from fleet.transport.prompt_client import PromptClient
from tests.brokers import Inbox, Site, running_site, wait_until
from tests.conftest import MakeTinyBundle
from tests.edge_agent.fleet_service import FleetService

TIMEOUT_S: Final = 60
ASKED: Final = PromptRequest(prompt="How warm is it?", max_new_tokens=4)


def edge_agent(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_agent", *arguments],
        input=text,
        capture_output=True,
        encoding="utf-8",
        timeout=TIMEOUT_S,
        env=os.environ | {"NO_COLOR": "1"},
        check=False,
    )


@contextmanager
def running(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`edge-agent run`, for the length of the block; it ends by itself when it is asked to."""
    command = [sys.executable, "-m", "edge_agent", "run", str(folder), "--threads", "1"]
    with subprocess.Popen(command) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(TIMEOUT_S) in (0, -signal.SIGKILL)


class Fleet:
    """A broker and a service of one authority, whose next device is d1."""

    def __init__(
        self, site: Site, service: FleetService, watcher: MqttTransport, app: MqttTransport
    ) -> None:
        self.site = site
        self.service = service
        self.watcher = watcher
        self.client = PromptClient(app)
        self._statuses = Inbox()
        watcher.subscribe(topics.DEVICE_STATUS_FILTER, self._statuses, qos=1)

    def status(self, **fields: object) -> DeviceStatus:
        """The next status that has these fields."""
        while True:
            status = decode_status(self._statuses.get(TIMEOUT_S)[1], DeviceStatus)
            if all(getattr(status, name) == value for name, value in fields.items()):
                return status

    def want(self, version: int, **settings: Any) -> None:
        desired = DesiredConfig(version, Settings(**settings))
        self.watcher.publish(
            topics.device_config("d1"), encode_desired(desired), qos=1, retain=True
        )

    def join(self, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
        token = str(self.service.token)
        return edge_agent("join", token, "--server", self.service.url, "--out", str(out), *options)


@pytest.fixture
def fleet(tmp_path: Path, tiny_bundle: Bundle) -> Iterator[Fleet]:
    with ExitStack() as stack:
        site = stack.enter_context(running_site("embedded", tmp_path))
        site.admit_any("d1")
        service = FleetService(tmp_path / "service", site.authority)
        service.name = "d1"
        service.broker_port = site.port
        service.bundle_id = service.publish(tiny_bundle.folder).bundle_id
        service.config = DesiredConfig(2, Settings(mode=Mode.STANDALONE, bundle=service.bundle_id))
        stack.enter_context(service.running())
        watcher = stack.enter_context(site.connect("s1"))
        app = stack.enter_context(site.connect("a1"))
        yield Fleet(site, service, watcher, app)


@pytest.fixture
def other(fleet: Fleet, make_tiny_bundle: MakeTinyBundle) -> Manifest:
    return fleet.service.publish(make_tiny_bundle((1, 2, 3)).folder)


def test_a_device_joins_and_serves_what_the_fleet_wants(fleet: Fleet, tmp_path: Path) -> None:
    out = tmp_path / "d1"
    joined = fleet.join(out)
    assert joined.returncode == 0, joined.stderr
    assert joined.stdout == f"d1 has joined; start it with: edge-agent run {out}\n"
    with running(out):
        status = fleet.status(online=True)
        assert (status.config_version, status.mode) == (2, "standalone")
        assert list(fleet.client.ask("d1", ASKED))[-1].bundle_id == fleet.service.bundle_id
    fleet.status(online=False)


def test_joining_says_in_json_what_came_of_it(fleet: Fleet, tmp_path: Path) -> None:
    joined = json.loads(fleet.join(tmp_path / "d1", "--json").stdout)
    assert (joined["name"], joined["bundle_id"]) == ("d1", fleet.service.bundle_id)
    assert fleet.service.token.secret not in json.dumps(joined)


def test_joining_again_mends_the_folder(fleet: Fleet, tmp_path: Path) -> None:
    fleet.join(tmp_path / "d1")
    (tmp_path / "d1" / "agent.json").write_text('{"num_threads": 1}')
    again = fleet.join(tmp_path / "d1")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "d1" / "agent.json").read_text() == '{"num_threads": 1}'


def test_a_device_whose_bundle_did_not_come_has_joined_and_fetches_it_when_it_runs(
    fleet: Fleet, tmp_path: Path
) -> None:
    assert fleet.service.bundle_id
    there = fleet.service.bundles / fleet.service.bundle_id
    away = fleet.service.bundles / "away"
    there.replace(away)
    joined = fleet.join(tmp_path / "d1")
    assert joined.returncode == 1
    assert "d1 has joined, but its bundle is missing" in joined.stderr
    away.replace(there)
    with running(tmp_path / "d1"):
        assert fleet.status(online=True).bundle_id == fleet.service.bundle_id


def test_a_token_on_stdin_may_begin_with_a_mark_and_end_as_a_line_of_windows(
    fleet: Fleet, tmp_path: Path
) -> None:
    arguments = ["join", "-", "--server", fleet.service.url, "--out", str(tmp_path / "d1")]
    joined = edge_agent(*arguments, text=f"\ufeff{fleet.service.token}\r\n")
    assert joined.returncode == 0, joined.stderr


def test_what_is_no_token_is_one_line_that_does_not_repeat_it(tmp_path: Path) -> None:
    result = edge_agent(
        "join", "s3cret", "--server", "https://127.0.0.1:1", "--out", str(tmp_path / "d1")
    )
    assert result.returncode == 1
    assert "no enrolment token" in result.stderr
    assert "s3cret" not in result.stderr


def test_a_device_that_is_killed_comes_back_on_what_it_had(
    fleet: Fleet, other: Manifest, tmp_path: Path
) -> None:
    out = tmp_path / "d1"
    fleet.join(out)
    with running(out) as process:
        fleet.status(online=True)
        fleet.want(3, bundle=other.bundle_id, max_new_tokens=3)
        status = fleet.status(config_version=3)
        assert (status.bundle_id, status.config_error) == (other.bundle_id, None)
        process.kill()
        process.wait(TIMEOUT_S)
    fleet.status(online=False)
    with running(out):
        status = fleet.status(online=True)
        assert (status.bundle_id, status.config_version) == (other.bundle_id, 3)
        assert list(fleet.client.ask("d1", ASKED))[-1].bundle_id == other.bundle_id


def test_a_device_renews_its_certificate_and_serves_on(fleet: Fleet, tmp_path: Path) -> None:
    out = tmp_path / "d1"
    fleet.service.life = timedelta(seconds=90)
    fleet.join(out)
    fleet.service.life = timedelta(days=90)
    before = (out / "key.pem").read_bytes()
    with running(out):
        assert fleet.status().online
        wait_until(
            lambda: (out / "key.pem").read_bytes() != before, "the key is another", TIMEOUT_S
        )
        assert list(fleet.client.ask("d1", ASKED))[-1].finish_reason == "length"
    assert fleet.service.paths("/renew") == [""]
