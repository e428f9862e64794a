"""Faults that take long to notice or to pass; they run in parallel, each in its own fleet."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from cloud_broker_worker.worker.config import WorkerConfig
from edge_agent.config import AgentConfig
from fleet.bundles.manifest import Bundle
from fleet.errors import FleetError, LinkError
from tests.brokers import wait_until
from tests.system.judge import judge
from tests.system.process_fleet import (
    ASKED,
    DEVICE,
    DEVICES,
    FIRST,
    NEIGHBOUR,
    SECOND,
    WAIT_S,
    ProcessFleet,
    process_fleet,
)

pytestmark = pytest.mark.mosquitto

NUM_AT_ONCE = 3
SCENARIO_S = 240.0
CONFIG = AgentConfig(num_threads=1, assist_deadline_ms=1500)


def broker_away_for_60_s(fleet: ProcessFleet, parts: ExitStack) -> None:
    without_broker(fleet, parts, 60.0)


def broker_away_for_10_s(fleet: ProcessFleet, parts: ExitStack) -> None:
    without_broker(fleet, parts, 10.0)


def broker_away_for_1_s(fleet: ProcessFleet, parts: ExitStack) -> None:
    without_broker(fleet, parts, 1.0)


def without_broker(fleet: ProcessFleet, parts: ExitStack, away_s: float) -> None:
    start(fleet, parts)

    def outage() -> None:
        fleet.broker.kill()
        fleet.broker.wait(WAIT_S)
        time.sleep(away_s)
        fleet.start_broker()

    fleet.answer_through(outage, may_neighbour_notice=True)


def device_half_open(fleet: ProcessFleet, parts: ExitStack) -> None:
    start(fleet, parts)
    fleet.answer_through(fleet.links[DEVICE].swallow)


def worker_half_open(fleet: ProcessFleet, parts: ExitStack) -> None:
    """Another worker takes its sessions over; it is no worse afterwards."""
    start(fleet, parts)

    def fault() -> None:
        fleet.links[FIRST].swallow()
        parts.enter_context(fleet.worker(SECOND))

    fleet.answer_through(fault, may_neighbour_notice=True)
    fleet.links[FIRST].heal()
    judge(fleet.bundle, ASKED, fleet.ask(ASKED))


def worker_stopped_for_a_while(fleet: ProcessFleet, parts: ExitStack) -> None:
    process = fleet.worker_process(FIRST)
    start_devices(fleet, parts)

    def fault() -> None:
        process.send_signal(signal.SIGSTOP)
        time.sleep(4.0)
        process.send_signal(signal.SIGCONT)

    fleet.answer_through(fault, may_neighbour_notice=True)


def worker_back_when_another_has_taken_over(fleet: ProcessFleet, parts: ExitStack) -> None:
    """Messages of a stopped worker about sessions that it lost are ignored."""
    process = fleet.worker_process(FIRST)
    start_devices(fleet, parts)

    def stop() -> None:
        process.send_signal(signal.SIGSTOP)
        parts.enter_context(fleet.worker(SECOND))

    fleet.answer_through(stop, may_neighbour_notice=True)
    # The neighbour's session may have ended, and been kept, at the worker before it stopped.
    with fleet.neighbour_is_served(may_notice=True):
        judge(
            fleet.bundle, ASKED, fleet.ask(ASKED, fault=lambda: process.send_signal(signal.SIGCONT))
        )
    judge(fleet.bundle, ASKED, fleet.ask(ASKED))
    fleet.check_counts()


def device_without_power(fleet: ProcessFleet, parts: ExitStack) -> None:
    """Its app gets an error, the worker drops the session, and the device answers later."""
    worker = parts.enter_context(
        fleet.worker(FIRST, WorkerConfig(num_threads=1, session_ttl_s=3.0))
    )
    parts.enter_context(fleet.device(NEIGHBOUR))
    fleet.device_process(DEVICE)

    def power_cut() -> None:
        fleet.kill(DEVICE)
        fleet.device_process(DEVICE)

    with fleet.neighbour_is_served(), pytest.raises(LinkError, match="has restarted"):
        fleet.ask(ASKED, fault=power_cut)
    judge(fleet.bundle, ASKED, fleet.ask(ASKED))
    wait_until(
        lambda: not worker.engine.sessions,
        "the worker has dropped the session that was never closed",
        WAIT_S,
    )


def two_devices_with_one_identity(fleet: ProcessFleet, parts: ExitStack) -> None:
    """They disconnect each other; an answer ends, and is right once one of them has left."""
    start(fleet, parts)
    fleet.device_process(DEVICE)
    with fleet.neighbour_is_served():
        for _ in range(2):
            try:
                judge(fleet.bundle, ASKED, fleet.ask(ASKED))
            except FleetError as error:
                print(f"ended with {error.code}: {error}")
    assert fleet.links[DEVICE].num_connections > 3
    fleet.kill(DEVICE)
    judge(fleet.bundle, ASKED, fleet.ask(ASKED))


def start(fleet: ProcessFleet, parts: ExitStack) -> None:
    parts.enter_context(fleet.worker(FIRST))
    start_devices(fleet, parts)


def start_devices(fleet: ProcessFleet, parts: ExitStack) -> None:
    for device in DEVICES:
        parts.enter_context(fleet.device(device, CONFIG))


Scenario = Callable[[ProcessFleet, ExitStack], None]
SCENARIOS: tuple[Scenario, ...] = (
    broker_away_for_60_s,
    device_half_open,
    two_devices_with_one_identity,
    broker_away_for_10_s,
    worker_back_when_another_has_taken_over,
    worker_stopped_for_a_while,
    device_without_power,
    worker_half_open,
    broker_away_for_1_s,
)


@pytest.fixture(scope="module")
def outcomes(
    tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle
) -> Iterator[dict[Scenario, Future[None]]]:
    """All scenarios, the longest first, `NUM_AT_ONCE` at a time."""
    folders = {scenario: tmp_path_factory.mktemp(scenario.__name__) for scenario in SCENARIOS}

    one_by_one = threading.Lock()  # Alembic migrates one database of a process at a time

    def run(scenario: Scenario) -> None:
        with ExitStack() as stack:
            with one_by_one:
                fleet = stack.enter_context(
                    process_fleet("mosquitto", folders[scenario], tiny_bundle)
                )
            scenario(fleet, stack.enter_context(ExitStack()))

    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        yield {scenario: pool.submit(run, scenario) for scenario in SCENARIOS}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_answers_outlive(scenario: Scenario, outcomes: dict[Scenario, Future[None]]) -> None:
    outcomes[scenario].result(SCENARIO_S)
