"""The default model: `fleet demo` gives the whole model's text, and the exits are real."""

from __future__ import annotations

import pytest

from benchmarks.whole_model import WholeModel
from cloud_broker_worker.worker.config import WorkerConfig
from edge_agent.config import AgentConfig
from fleet.bundles.manifest import Bundle
from fleet.protocol.modes import CLOUD
from fleet.protocol.prompt import PromptRequest
from tests.system.memory_fleet import memory_fleet

pytestmark = pytest.mark.real_model

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Write a haiku.",
    "Name three fruits.",
)


def test_with_every_exit_off_the_answers_are_the_whole_models(real_bundle: Bundle) -> None:
    whole = WholeModel(real_bundle)
    with memory_fleet() as fleet:
        fleet.start_worker(real_bundle, WorkerConfig(num_threads=2, weights="float32"))
        fleet.start_device(real_bundle, AgentConfig(num_threads=2, assist_deadline_ms=30_000))
        for prompt in PROMPTS:
            answer = fleet.ask(PromptRequest(prompt=prompt, threshold=1.0, max_new_tokens=24))
            assert answer.token_ids == whole.generate(prompt, 24)
            assert answer.sources == {CLOUD: len(answer.token_ids)}
        assert (
            "Paris"
            in fleet.ask(PromptRequest(prompt=PROMPTS[0], threshold=1.0, max_new_tokens=16)).text
        )


def test_at_the_shipped_thresholds_exits_and_cloud_share_the_work(real_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        fleet.start_worker(real_bundle, WorkerConfig(num_threads=2, weights="float32"))
        fleet.start_device(real_bundle, AgentConfig(num_threads=2, assist_deadline_ms=30_000))
        sources: dict[str, int] = {}
        for prompt in PROMPTS:
            for source, count in fleet.ask(
                PromptRequest(prompt=prompt, max_new_tokens=48)
            ).sources.items():
                sources[source] = sources.get(source, 0) + count
    assert sources[CLOUD] > 0
    assert sum(count for source, count in sources.items() if source.startswith("exit:")) > 0
