"""Auto mode over a link that is good, slow, down and back; each answer lists its switches."""

from __future__ import annotations

from collections.abc import Iterator
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

TARGET_MS = 120.0
# A wait that was right for the old link is lost first, then doubled until the new one is measured.
MOST_ANSWERS = 5
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


def test_a_device_follows_its_link(fleet: ProcessFleet) -> None:
    good = fleet.ask(PROMPT)
    assert CLOUD in good.sources
    assert not any(mode == Mode.STANDALONE for mode, _ in switches(good))

    fleet.links[FIRST].shape(Shape(latency_s=0.15))
    slow = [switch for _ in range(MOST_ANSWERS) for switch in switches(fleet.ask(PROMPT))]
    assert any(
        mode == Mode.STANDALONE and f"target {TARGET_MS:g}" in reason for mode, reason in slow
    )

    fleet.kill(FIRST)
    gone = fleet.ask(PROMPT)
    assert switches(gone) == [(Mode.STANDALONE, "the link is down")]
    assert CLOUD not in gone.sources

    fleet.links[FIRST].shape(SLOW)
    fleet.worker_process()
    back = [fleet.ask(PROMPT) for _ in range(MOST_ANSWERS)]
    assert not any(mode == Mode.STANDALONE for mode, _ in switches(back[-1]))
    assert CLOUD in back[-1].sources
    fleet.check_counts()
