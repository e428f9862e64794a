"""The command ``python -m cloud_broker_worker``."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

import pytest

from cloud_broker_worker.worker.cli import main
from fleet.bundles.manifest import Bundle
from fleet.identity.identity import Identity
from fleet.protocol import topics
from fleet.protocol.access import Role
from fleet.protocol.codec import decode_to_device, encode
from fleet.protocol.messages import PROTOCOL, Gap, Open, Opened, Refused, Sampling, Verify
from fleet.protocol.report import WorkerStatus, decode_status
from fleet.transport.mqtt import MqttTransport
from provisioning.authority import CertificateAuthority
from tests.brokers import HOST, Inbox, Site, free_port, running_site
from tests.identities import issue_identity

START_S = 90.0


@pytest.fixture
def issue(tmp_path: Path) -> Callable[[Role], Identity]:
    """Identities for a broker that is not there."""
    authority = CertificateAuthority.create(tmp_path / "ca")
    port = free_port()
    return lambda role: issue_identity(
        authority, "worker-1", role, tmp_path / role, host=HOST, port=port
    )


def fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> str:
    """Run the command, expect exit status 1, and return its one line on stderr."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the test runner keeps its own
    monkeypatch.setattr(sys, "argv", ["worker", "run", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_a_folder_without_an_identity_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert f"no usable identity in {tmp_path}" in fails(capsys, monkeypatch, str(tmp_path))


def test_the_identity_of_a_device_is_refused(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    issue: Callable[[Role], Identity],
) -> None:
    line = fails(capsys, monkeypatch, str(issue(Role.DEVICE).folder))
    assert "is the identity of a device, expected a worker's" in line


def test_a_worker_without_a_bundle_is_told_how_to_name_one(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    issue: Callable[[Role], Identity],
) -> None:
    assert "names no bundle; pass one with --bundle DIR" in fails(
        capsys, monkeypatch, str(issue(Role.WORKER).folder)
    )


class RunningWorker:
    """Worker w1 as a process, and what it says in its status."""

    def __init__(self, site: Site, server: MqttTransport, bundle: Bundle, *options: str) -> None:
        self.bundle = bundle
        self.statuses = Inbox()
        server.subscribe(topics.WORKER_STATUS_FILTER, self.statuses, qos=1)
        folder = site.identity("w1").folder
        command = [
            sys.executable,
            "-m",
            "cloud_broker_worker",
            "run",
            str(folder),
            "--bundle",
            str(bundle.folder),
        ]
        self.process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._killer = threading.Timer(START_S, self.process.kill)

    def __enter__(self) -> Self:
        self._killer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._killer.cancel()
        self.process.kill()
        self.process.communicate()

    def ready_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def next_status(self) -> WorkerStatus:
        return decode_status(self.statuses.get()[1], WorkerStatus)

    def end(self) -> tuple[int, str]:
        """Exit status and stderr of a process that was told to stop."""
        _, stderr = self.process.communicate(timeout=START_S)
        return self.process.returncode, stderr


def test_a_worker_process_says_when_it_is_ready_and_leaves_in_good_order_on_sigterm(
    tmp_path: Path, cloud_bundle: Callable[[int], Bundle]
) -> None:
    bundle = cloud_bundle(2)
    with (
        running_site("embedded", tmp_path) as site,
        site.connect("s1") as server,
        RunningWorker(site, server, bundle) as worker,
    ):
        assert worker.ready_line().startswith(
            f"worker w1 serves tiny, bundle {bundle.manifest.bundle_id}, layers 2 to 4, "
            "weights float32 (no other kind is known to agree on 99.5% of tokens)"
        )
        born = worker.next_status()
        worker.process.send_signal(signal.SIGTERM)
        assert worker.end() == (0, "")
        draining = worker.next_status()
        gone = worker.next_status()
    assert born.online
    assert born.weights == "float32"
    assert born.bundle_ids == (bundle.manifest.bundle_id,)
    assert (draining.online, draining.draining) == (True, True)
    assert not gone.online


def test_after_one_sigterm_sessions_are_served_on_and_after_a_second_they_are_sent_away(
    tmp_path: Path, cloud_bundle: Callable[[int], Bundle]
) -> None:
    bundle = cloud_bundle(2)
    with (
        running_site("embedded", tmp_path) as site,
        site.connect("s1") as server,
        site.connect("d1") as device,
        RunningWorker(site, server, bundle) as worker,
    ):
        worker.ready_line()
        answers = Inbox()
        device.subscribe(topics.to_device("d1", "+"), answers)
        opening = Open(
            session="a1",
            epoch=1,
            bundle_id=bundle.manifest.bundle_id,
            protocol=PROTOCOL,
            sampling=Sampling(),
            max_positions=64,
            deadline_ms=60_000,
        )
        device.publish(topics.open_session("d1"), encode(opening), qos=1)
        assert isinstance(decode_to_device(answers.get()[1]), Opened)
        worker.process.send_signal(signal.SIGTERM)
        while not worker.next_status().draining:
            pass
        request = Verify(session="a1", request=0, branch=0, start=5, draft=(1,), deadline_ms=60_000)
        device.publish(
            topics.to_worker("w1", "d1", "a1"),
            encode(request),
        )
        assert decode_to_device(answers.get()[1]) == Gap("a1", 0, 0)
        worker.process.send_signal(signal.SIGTERM)
        refused = decode_to_device(answers.get()[1])
        assert worker.end() == (0, "")
    assert isinstance(refused, Refused)
    assert (refused.code, refused.worker) == ("draining", "w1")
