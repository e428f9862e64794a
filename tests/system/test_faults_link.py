"""Links that are slow, narrow, cut or frozen: answers end and are right, as the neighbour's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from benchmarks.proxy import Proxy, Shape
from edge_agent.config import AgentConfig
from fleet.bundles.manifest import Bundle
from fleet.protocol.modes import CLOUD, Mode
from tests.system.judge import judge, request
from tests.system.process_fleet import DEVICE, DEVICES, FIRST, SLOW, ProcessFleet, process_fleet

pytestmark = pytest.mark.mosquitto

PROMPT = "How warm is it?"
LONG_PROMPT = "0123456789 " * 30
AWAY_S = 2.0
HASTY = AgentConfig(num_threads=1, assist_deadline_ms=1500)  # less than a link is away
PATIENT = AgentConfig(num_threads=1, assist_deadline_ms=60_000)
MODES = (Mode.VERIFIED, Mode.COLLABORATIVE)
SHAPES = {
    "200 ms, give or take 100": (Shape(latency_s=0.2, jitter_s=0.1), PROMPT, 12),
    "1 Mbit/s": (Shape(latency_s=0.01, bytes_per_s=125_000, piece_bytes=1460), LONG_PROMPT, 48),
    "slices of 7 bytes": (Shape(piece_bytes=7), LONG_PROMPT, 48),
}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle) -> Iterator[ProcessFleet]:
    """A worker; the tests start the devices."""
    with (
        process_fleet("mosquitto", tmp_path_factory.mktemp("links"), tiny_bundle) as fleet,
        fleet.worker(),
    ):
        yield fleet


@contextmanager
def devices(fleet: ProcessFleet, config: AgentConfig) -> Iterator[None]:
    with ExitStack() as parts:
        for name in DEVICES:
            parts.enter_context(fleet.device(name, config))
        yield


@pytest.mark.parametrize("shape", SHAPES)
def test_answers_over_a_bad_link_are_right(fleet: ProcessFleet, shape: str) -> None:
    each_way, prompt, num_tokens = SHAPES[shape]
    asked = [request(prompt, mode, num_tokens) for mode in MODES]
    fleet.links[DEVICE].shape(each_way)
    with devices(fleet, PATIENT), fleet.neighbour_is_served(), ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(fleet.ask, asked))
    fleet.links[DEVICE].shape(SLOW)
    for one, answer in zip(asked, answers, strict=True):
        judge(fleet.bundle, one, answer)
        assert one.mode is Mode.VERIFIED or set(answer.sources) == {CLOUD}
    fleet.check_counts()


def refuse_for_a_while(link: Proxy) -> None:
    link.refuse()
    time.sleep(AWAY_S)
    link.heal()


def freeze_for_a_while(link: Proxy) -> None:
    link.freeze()
    time.sleep(AWAY_S)
    link.heal()


@pytest.mark.parametrize("fault", [Proxy.cut, Proxy.reset, refuse_for_a_while, freeze_for_a_while])
def test_an_answer_outlives_its_devices_link(
    fleet: ProcessFleet, fault: Callable[[Proxy], None]
) -> None:
    with devices(fleet, HASTY):
        fleet.answer_through(lambda: fault(fleet.links[DEVICE]))


@pytest.mark.parametrize("fault", [Proxy.reset, freeze_for_a_while])
def test_answers_outlive_their_workers_link(
    fleet: ProcessFleet, fault: Callable[[Proxy], None]
) -> None:
    with devices(fleet, HASTY):
        fleet.answer_through(lambda: fault(fleet.links[FIRST]), may_neighbour_notice=True)
