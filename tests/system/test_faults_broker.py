"""The broker is stopped or killed during answers: they end, are right, and are counted."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from fleet.bundles.manifest import Bundle
from fleet.protocol.modes import CLOUD, Mode
from tests.brokers import BROKERS
from tests.system.judge import judge, next_turn, request
from tests.system.process_fleet import (
    ANSWER_S,
    DEVICE,
    FIRST_TURN,
    NEIGHBOUR,
    WAIT_S,
    ProcessFleet,
    process_fleet,
)

ASKED = {
    DEVICE: request("How warm is it?", Mode.VERIFIED, 48),
    NEIGHBOUR: request("Say something about rivers.", Mode.COLLABORATIVE, 48),
}


@pytest.fixture(scope="module", params=BROKERS)
def fleet(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle
) -> Iterator[ProcessFleet]:
    """A worker and two devices, which have answered once, and the cloud had its part."""
    with (
        process_fleet(request.param, tmp_path_factory.mktemp(request.param), tiny_bundle) as fleet,
        ExitStack() as parts,
    ):
        parts.enter_context(fleet.worker())
        for device, asked in ASKED.items():
            parts.enter_context(fleet.device(device))
            answer = fleet.ask(asked, device)
            judge(tiny_bundle, asked, answer)
            assert CLOUD in answer.sources
        fleet.check_counts()
        yield fleet


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_answers_outlive_a_broker_that_is_started_again(
    fleet: ProcessFleet, how: signal.Signals
) -> None:
    def outage() -> None:
        fleet.broker.send_signal(how)
        fleet.broker.wait(WAIT_S)
        fleet.start_broker()

    asked = next_turn(FIRST_TURN, fleet.ask(FIRST_TURN), "And now?", num_tokens=48)
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(fleet.ask, ASKED[NEIGHBOUR], NEIGHBOUR)
        answers = {
            DEVICE: fleet.ask(asked, DEVICE, outage),
            NEIGHBOUR: beside.result(ANSWER_S),
        }
    for device, answer in answers.items():
        judge(fleet.bundle, asked if device == DEVICE else ASKED[NEIGHBOUR], answer)
        assert answer.last.note is not None, f"{device} did not notice"
    fleet.check_counts()
