"""Workers that are killed, and devices that are wrong about the time."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from fleet.bundles.manifest import Bundle
from tests.system.judge import judge
from tests.system.process_fleet import (
    ASKED,
    DEVICE,
    FIRST,
    NEIGHBOUR,
    SECOND,
    ProcessFleet,
    process_fleet,
)

pytestmark = pytest.mark.mosquitto

DAY_S = 86_400


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle) -> Iterator[ProcessFleet]:
    """A broker and its registry. Workers and devices are each test's own."""
    with process_fleet("mosquitto", tmp_path_factory.mktemp("processes"), tiny_bundle) as fleet:
        yield fleet


@pytest.fixture
def parts() -> Iterator[ExitStack]:
    """End with the test all that it starts in this process."""
    with ExitStack() as stack:
        yield stack


def test_the_only_worker_is_killed_in_mid_answer_and_started_again(
    fleet: ProcessFleet, parts: ExitStack
) -> None:
    def fault() -> None:
        fleet.kill(FIRST)
        fleet.worker_process(FIRST)

    fleet.worker_process(FIRST)
    parts.enter_context(fleet.device(DEVICE))
    parts.enter_context(fleet.device(NEIGHBOUR))
    fleet.answer_through(fault, may_neighbour_notice=True)


def test_another_worker_answers_what_a_killed_one_was_asked(
    fleet: ProcessFleet, parts: ExitStack
) -> None:
    process = fleet.worker_process(FIRST)
    parts.enter_context(fleet.device(DEVICE))
    parts.enter_context(fleet.device(NEIGHBOUR))

    def fault() -> None:
        process.send_signal(signal.SIGSTOP)  # the question that comes next is never read
        parts.enter_context(fleet.worker(SECOND))
        fleet.kill(FIRST)

    fleet.answer_through(fault, may_neighbour_notice=True)


def test_a_worker_killed_behind_an_answer_is_not_missed_by_the_next(
    fleet: ProcessFleet, parts: ExitStack
) -> None:
    fleet.worker_process(FIRST)
    parts.enter_context(fleet.device(DEVICE))
    judge(fleet.bundle, ASKED, fleet.ask(ASKED))
    parts.enter_context(fleet.worker(SECOND))
    fleet.kill(FIRST)
    judge(fleet.bundle, ASKED, fleet.ask(ASKED))
    fleet.check_counts()


def test_devices_whose_clocks_are_wrong_by_a_day_answer_and_are_counted(
    fleet: ProcessFleet, parts: ExitStack
) -> None:
    parts.enter_context(fleet.worker(SECOND))
    for device, error_s in (DEVICE, DAY_S), (NEIGHBOUR, -DAY_S):
        fleet.device_process(device, "tests.system.wrong_clock", str(error_s))
        for _ in range(2):
            answer = fleet.ask(ASKED, device)
            judge(fleet.bundle, ASKED, answer)
            assert answer.last.note is None
        fleet.check_counts()
        fleet.kill(device)
