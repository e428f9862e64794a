"""The command ``python -m cloud_broker_worker``."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cloud_broker_worker.cli import main
from fleet import topics
from fleet.access import Role
from fleet.identity import Identity
from fleet.manifest import Bundle
from fleet.report import WorkerStatus, decode_status
from provisioning.authority import CertificateAuthority
from tests.brokers import HOST, Inbox, free_port, running_site

START_S = 90.0


@pytest.fixture
def issue(tmp_path: Path) -> Callable[[Role], Identity]:
    """Identities for a broker that is not there."""
    authority = CertificateAuthority.create(tmp_path / "ca")
    port = free_port()
    return lambda role: authority.issue("worker-1", role, tmp_path / role, HOST, port)


def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """Runs the command, expects exit status 1, and gives its one line on stderr."""
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
    assert f"no identity in {tmp_path}" in fails(capsys, monkeypatch, str(tmp_path))


def test_the_identity_of_a_device_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, issue: Callable[[Role], Identity]
) -> None:
    line = fails(capsys, monkeypatch, str(issue(Role.DEVICE).folder))
    assert "is the identity of a device, expected a worker's" in line


def test_a_worker_without_a_bundle_is_told_how_to_name_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, issue: Callable[[Role], Identity]
) -> None:
    assert "names no bundle; pass one with --bundle DIR" in fails(capsys, monkeypatch, str(issue(Role.WORKER).folder))


def test_a_broker_that_is_not_there_is_named(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    issue: Callable[[Role], Identity],
    cloud_bundle: Callable[[int], Bundle],
) -> None:
    identity = issue(Role.WORKER)
    line = fails(capsys, monkeypatch, str(identity.folder), "--bundle", str(cloud_bundle(2).folder))
    assert f"{HOST}:{identity.config.port}" in line


def test_a_worker_process_says_when_it_is_ready_and_leaves_in_good_order_on_sigterm(
    tmp_path: Path, cloud_bundle: Callable[[int], Bundle]
) -> None:
    bundle = cloud_bundle(2)
    with running_site("amqtt", tmp_path) as site, site.connect("s1") as server:
        inbox = Inbox()
        server.subscribe(topics.WORKER_STATUS_FILTER, inbox, qos=1)
        folder = site.identity("w1").folder
        command = [sys.executable, "-m", "cloud_broker_worker", "run", str(folder), "--bundle", str(bundle.folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            killer = threading.Timer(START_S, process.kill)
            killer.start()
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                assert f"worker w1 serves tiny, bundle {bundle.manifest.bundle_id}, layers 2 to 4" in line
                born = decode_status(inbox.get()[1], WorkerStatus)
                process.send_signal(signal.SIGTERM)
                _, stderr = process.communicate(timeout=START_S)
            finally:
                killer.cancel()
                process.kill()
        draining, gone = (decode_status(inbox.get()[1], WorkerStatus) for _ in range(2))
    assert (process.returncode, stderr) == (0, "")
    assert born.online
    assert born.bundle_ids == (bundle.manifest.bundle_id,)
    assert (draining.online, draining.draining) == (True, True)
    assert not gone.online
