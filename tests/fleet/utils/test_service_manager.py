"""Messages to the service manager, and the watchdog that depends on every loop."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from fleet.utils.service_manager import ALIVE, READY, Watchdog, notify, watchdog_interval_s
from tests.service_manager import notify_socket


def test_a_message_arrives_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with notify_socket(tmp_path) as manager:
        monkeypatch.setenv("NOTIFY_SOCKET", str(manager.path))
        notify(READY)
        assert manager.receive(1) == "READY=1"


def test_an_abstract_socket_receives_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"fleet-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
        link.bind(f"\0{name}")
        link.settimeout(1)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        notify(READY)
        assert link.recv(100) == b"READY=1"


def test_without_a_manager_or_with_one_that_has_gone_nothing_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify(READY)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    notify(READY)


@pytest.mark.parametrize(
    ("environ", "interval_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_interval_is_that_of_this_process(
    environ: dict[str, str], interval_s: float | None
) -> None:
    assert watchdog_interval_s(environ) == interval_s


def test_the_manager_receives_a_message_once_each_loop_has_completed_a_cycle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with notify_socket(tmp_path) as manager:
        monkeypatch.setenv("NOTIFY_SOCKET", str(manager.path))
        monkeypatch.setenv("WATCHDOG_USEC", "1")
        watchdog = Watchdog()
        first = watchdog.watch("first")
        second = watchdog.watch("second")
        for _ in range(3):
            first()
        assert manager.receive(0.05) is None
        second()
        assert manager.receive(1) == ALIVE
        second()
        assert manager.receive(0.05) is None


def test_messages_are_as_rare_as_the_interval_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with notify_socket(tmp_path) as manager:
        monkeypatch.setenv("NOTIFY_SOCKET", str(manager.path))
        monkeypatch.setenv("WATCHDOG_USEC", str(3600 * 10**6))
        cycle = Watchdog().watch("only")
        for _ in range(100):
            cycle()
        assert manager.receive(1) == ALIVE
        assert manager.receive(0.05) is None
