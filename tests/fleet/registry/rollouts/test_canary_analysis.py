"""How often chance decides on a bundle: stages of made-up answers, watched as the engine watches them.

An answer's offload is drawn from a beta distribution around the bundle's, its agreement likewise in a quarter of the
answers, its time a token from a log-normal one. Seeds are fixed.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import NamedTuple

import pytest

from fleet.registry.rollouts.canary_analysis import Evidence, examine
from fleet.registry.rollouts.plan import RolloutDecision, RolloutPlan, RolloutStep, judge
from fleet.registry.stats.aggregate import Tally
from tests.fleet.conftest import report

PLAN = RolloutPlan()
ANSWERS_A_LOOK = 2
NUM_LOOKS = 30
NUM_BEFORE = 300
NUM_STAGES = 20


class Model(NamedTuple):
    """What a bundle is behind the figures of its answers."""

    offload: float = 0.2
    agreement: float = 0.93
    errors: float = 0.01
    slowness: float = 1.0

    def answer(self, draw: random.Random, counted: Tally) -> None:
        tokens = draw.randint(10, 60)
        offload = draw.betavariate(4 * self.offload, 4 * (1 - self.offload))
        cloud = sum(draw.random() < offload for _ in range(tokens))
        agreement = draw.betavariate(20 * self.agreement, 20 * (1 - self.agreement))
        judged = tokens - cloud if draw.random() < PLAN.agreement_sample else 0
        counted.add(
            report(
                tokens=tokens, sources={"cloud": cloud, "exit:8": tokens - cloud}, judged=judged,
                agreed=sum(draw.random() < agreement for _ in range(judged)),
                tpot_ms=30 * self.slowness * draw.lognormvariate(0.0, 0.5),
                finish_reason="error" if draw.random() < self.errors else "stop",
            )
        )  # fmt: skip


def watch(model: Model, seed: int) -> RolloutDecision:
    """What is decided in the end of one stage; waiting when nothing was after ten times its observation."""
    draw = random.Random(seed)
    before = Tally()
    new = Tally()
    for _ in range(NUM_BEFORE):
        Model().answer(draw, before)
    decided = RolloutDecision(RolloutStep.WAIT, "")
    for look in range(1, 10 * NUM_LOOKS):
        for _ in range(ANSWERS_A_LOOK):
            model.answer(draw, new)
        watched_s = look * PLAN.observe_s / NUM_LOOKS
        evidence = Evidence(new.counts, before.counts, Counter())
        findings = examine(evidence, PLAN.limits, is_final=watched_s >= PLAN.observe_s)
        decided = judge(PLAN, findings, evidence.num_answers, watched_s)
        if decided.step is not RolloutStep.WAIT:
            break
    return decided


@pytest.mark.parametrize("model", [Model(), Model(offload=0.22, slowness=1.1)])
def test_a_bundle_that_is_as_good_is_not_undone_by_chance(model: Model) -> None:
    decided = [watch(model, seed).step for seed in range(NUM_STAGES)]
    assert decided == [RolloutStep.ADVANCE] * NUM_STAGES


@pytest.mark.parametrize(
    "model",
    [Model(offload=0.5), Model(agreement=0.7), Model(errors=0.25), Model(slowness=2.5)],
    ids=str,
)
def test_a_bundle_that_is_far_worse_is_undone(model: Model) -> None:
    decided = [watch(model, seed).step for seed in range(NUM_STAGES)]
    assert decided == [RolloutStep.UNDO] * NUM_STAGES
