"""A sample of collaborative answers is verified by the cloud to measure agreement."""

from __future__ import annotations

import itertools

import pytest

from edge_agent.config import AgentConfig
from edge_agent.engine.tokenizer import ChatTokenizer
from edge_agent.serving.request_planner import RequestPlanner
from fleet.bundles.manifest import Bundle
from fleet.graphs.partition import Partition
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import PromptRequest
from fleet.protocol.report import GenerationReport
from tests.system.memory_fleet import WAIT_S, Answer, MemoryFleet, memory_fleet

SAMPLED = AgentConfig(
    num_threads=1, agreement_sample=1.0, thresholds=(0.0, 0.0), assist_deadline_ms=20_000
)
ASKED = PromptRequest(prompt="How warm is it?", max_new_tokens=24)


def report_of(fleet: MemoryFleet) -> GenerationReport:
    return fleet.reports.get(timeout=WAIT_S)


def test_a_sample_says_how_often_the_cloud_agreed(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle, SAMPLED)
        answer = fleet.ask(ASKED)
        report = report_of(fleet)
    assert (report.mode, report.tokens) == ("collaborative", 24)
    assert report.judged > 0
    assert 0 <= report.agreed <= report.judged
    assert answer.last.usage
    assert [(switch.token, switch.mode) for switch in answer.last.usage.switches] == [
        (0, "verified")
    ]


@pytest.mark.parametrize("mode", [Mode.COLLABORATIVE, Mode.STANDALONE])
def test_who_names_a_mode_gets_that(tiny_bundle: Bundle, mode: Mode) -> None:
    with memory_fleet() as fleet:
        fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle, SAMPLED)
        fleet.ask(PromptRequest(prompt="x", max_new_tokens=4, mode=mode))
        assert report_of(fleet).judged == 0


def test_without_a_worker_a_sample_is_an_answer_like_any_other(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        fleet.start_device(tiny_bundle, SAMPLED)
        answer = fleet.ask(ASKED)
    assert answer.last.finish_reason == "length"
    assert answer.last.usage
    assert (answer.sources, answer.last.usage.switches) == ({"exit:1": 24}, ())


def test_a_sample_that_loses_the_cloud_goes_on_without_it(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        _, worker = fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle, SAMPLED)
        answer = Answer()
        for reply in fleet.client.ask(
            "edge-1", PromptRequest(prompt="x", max_new_tokens=200), timeout_s=WAIT_S
        ):
            answer.replies.append(reply)
            if reply.seq == 2:
                worker.drop()
    assert (answer.last.finish_reason, len(answer.token_ids)) == ("length", 200)
    assert answer.last.usage
    assert [switch.mode for switch in answer.last.usage.switches] == ["verified", "collaborative"]


def test_the_share_is_by_the_draws_that_were_given(tiny_bundle: Bundle) -> None:
    draws = itertools.cycle([0.1, 0.3, 0.6])
    config = AgentConfig(agreement_sample=0.5)
    planner = RequestPlanner(
        Partition(tiny_bundle, num_threads=1),
        ChatTokenizer(tiny_bundle),
        config,
        lambda: next(draws),
    )
    assert [planner.plan(ASKED).is_sample for _ in range(6)] == [
        True,
        True,
        False,
        True,
        True,
        False,
    ]
