"""The stop of commands."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from fleet.utils.cli_runtime import stop_event, wait_stopped

WAIT_S = 30.0


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    numbers = signal.SIGTERM, signal.SIGINT
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_command_at_any_time(number: signal.Signals) -> None:
    stop = stop_event()
    with stop._cond:  # type: ignore[attr-defined]  # as it is for a moment in `stop.wait`
        signal.raise_signal(number)
    assert stop.wait(WAIT_S)


def test_a_signal_to_another_thread_stops_a_command() -> None:
    stop = stop_event()
    waiting = threading.Timer(
        0.1, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    )
    waiting.start()
    wait_stopped(stop)
    waiting.join(WAIT_S)
