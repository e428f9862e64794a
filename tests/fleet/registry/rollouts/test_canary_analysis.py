"""Simulated stages: the share of decisions that are chance, with the steps of the engine.

An answer's offload is drawn from a beta distribution around the bundle's, its agreement likewise in
a quarter of the answers, its time per token from a log-normal one. Seeds are fixed.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import NamedTuple

import pytest

from fleet.registry.rollouts.canary_analysis import Evidence, examine
from fleet.registry.rollouts.plan import RolloutDecision, RolloutPlan, RolloutStep, judge
from fleet.registry.stats.aggregate import ReportAggregate
from tests.fleet.conftest import report

PLAN = RolloutPlan()
ANSWERS_PER_LOOK = 2
NUM_LOOKS = 30
NUM_BEFORE = 300
NUM_STAGES = 20


class Model(NamedTuple):
    """The distributions of a bundle's answers."""

    offload: float = 0.2
    agreement: float = 0.93
    errors: float = 0.01
    slowness: float = 1.0

    def answer(self, draw: random.Random, aggregate: ReportAggregate) -> None:
        tokens = draw.randint(10, 60)
        offload = draw.betavariate(4 * self.offload, 4 * (1 - self.offload))
        cloud = sum(draw.random() < offload for _ in range(tokens))
        agreement = draw.betavariate(20 * self.agreement, 20 * (1 - self.agreement))
        judged = tokens - cloud if draw.random() < PLAN.agreement_sample else 0
        aggregate.add(
            report(
                tokens=tokens,
                sources={"cloud": cloud, "exit:8": tokens - cloud},
                judged=judged,
                agreed=sum(draw.random() < agreement for _ in range(judged)),
                tpot_ms=30 * self.slowness * draw.lognormvariate(0.0, 0.5),
                finish_reason="error" if draw.random() < self.errors else "stop",
            )
        )


def watch(model: Model, seed: int) -> RolloutDecision:
    """Return the decision on one stage; to wait when there is none after ten observations."""
    draw = random.Random(seed)
    before = ReportAggregate()
    new = ReportAggregate()
    for _ in range(NUM_BEFORE):
        Model().answer(draw, before)
    decision = RolloutDecision(RolloutStep.WAIT, "")
    for look in range(1, 10 * NUM_LOOKS):
        for _ in range(ANSWERS_PER_LOOK):
            model.answer(draw, new)
        watched_s = look * PLAN.observe_s / NUM_LOOKS
        evidence = Evidence(Counter(new.columns()), Counter(before.columns()), Counter())
        findings = examine(evidence, PLAN.limits, is_final=watched_s >= PLAN.observe_s)
        decision = judge(PLAN, findings, evidence.num_answers, watched_s)
        if decision.step is not RolloutStep.WAIT:
            break
    return decision


@pytest.mark.parametrize("model", [Model(), Model(offload=0.22, slowness=1.1)])
def test_a_bundle_that_is_as_good_is_not_undone_by_chance(model: Model) -> None:
    steps = [watch(model, seed).step for seed in range(NUM_STAGES)]
    assert steps == [RolloutStep.ADVANCE] * NUM_STAGES


@pytest.mark.parametrize(
    "model",
    [Model(offload=0.5), Model(agreement=0.7), Model(errors=0.25), Model(slowness=2.5)],
    ids=str,
)
def test_a_bundle_that_is_far_worse_is_undone(model: Model) -> None:
    steps = [watch(model, seed).step for seed in range(NUM_STAGES)]
    assert steps == [RolloutStep.UNDO] * NUM_STAGES
