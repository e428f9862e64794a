"""Auto mode over a link that is good, slow, down and back; each answer lists its switches.

How many answers it takes to measure a link depends on the machine, so the device is asked until its
answer shows the change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.proxy import Shape
from edge_agent.config import AgentConfig
from fleet.bundles.manifest import Bundle
from fleet.protocol.modes import CLOUD, Mode
from fleet.protocol.prompt import PromptRequest
from tests.system.memory_fleet import Answer
from tests.system.process_fleet import FIRST, SLOW, ProcessFleet, process_fleet

pytestmark = pytest.mark.mosquitto

TARGET_MS = 300.0
SLOWER = Shape(latency_s=0.3)  # a round trip takes twice the target
# A wait that was right for the old link is lost first, then doubled until the new one is measured.
MOST_ANSWERS = 40
PROMPT = PromptRequest(
    prompt="Tell me about the sea.",
    mode=Mode.AUTO,
    threshold=0.5,
    target_tpot_ms=TARGET_MS,
    min_agreement=0.0,
    max_new_tokens=96,
)


@pytest.fixture
def fleet(tmp_path: Path, tiny_bundle: Bundle) -> Iterator[ProcessFleet]:
    with process_fleet("mosquitto", tmp_path, tiny_bundle) as fleet:
        fleet.worker_process()
        with fleet.device(config=AgentConfig(num_threads=1)):
            yield fleet


def switches(answer: Answer) -> list[tuple[str, str]]:
    assert answer.last.error is None
    assert answer.last.usage is not None
    return [(switch.mode, switch.reason) for switch in answer.last.usage.switches]


def is_alone(answer: Answer) -> bool:
    return any(mode == Mode.STANDALONE for mode, _ in switches(answer))


def misses_target(answer: Answer) -> bool:
    return any(
        mode == Mode.STANDALONE and f"target {TARGET_MS:g}" in reason
        for mode, reason in switches(answer)
    )


def has_cloud(answer: Answer) -> bool:
    return CLOUD in answer.sources and not is_alone(answer)


def ask_until(fleet: ProcessFleet, condition: Callable[[Answer], bool]) -> None:
    seen = []
    for _ in range(MOST_ANSWERS):
        answer = fleet.ask(PROMPT)
        if condition(answer):
            return
        seen.append(switches(answer))
    pytest.fail(f"none of {MOST_ANSWERS} answers has {condition.__name__}; switches: {seen}")


def test_a_device_follows_its_link(fleet: ProcessFleet) -> None:
    ask_until(fleet, has_cloud)

    fleet.links[FIRST].shape(SLOWER)
    ask_until(fleet, misses_target)

    fleet.kill(FIRST)
    gone = fleet.ask(PROMPT)
    assert switches(gone) == [(Mode.STANDALONE, "the link is down")]
    assert CLOUD not in gone.sources

    fleet.links[FIRST].shape(SLOW)
    fleet.worker_process()
    ask_until(fleet, has_cloud)
    fleet.check_counts()
