"""Decisions of roll-outs from values: tables of states, stages, outcomes and evidence."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from fleet.errors import RolloutError
from fleet.protocol.report import ConfigProblem
from fleet.registry.rollouts.canary_analysis import (
    FINAL_Z,
    INTERIM_Z,
    CanaryLimits,
    Evidence,
    Finding,
    Outcome,
    ShareSample,
    examine,
    increase_bound,
    share_above,
    wilson,
)
from fleet.registry.rollouts.plan import (
    Candidate,
    DeviceOutcome,
    PreviousState,
    ReasonedOutcome,
    RolloutClock,
    RolloutDecision,
    RolloutPlan,
    RolloutProgress,
    RolloutStep,
    check_plan,
    controls_for,
    decide_step,
    judge,
    next_stage,
    outcome_of,
)
from fleet.registry.rollouts.states import (
    LEGAL_EVENTS,
    OPEN,
    RolloutEvent,
    RolloutState,
    next_rollout_state,
)
from fleet.registry.stats.aggregate import ReportAggregate, bucket
from tests.fleet.conftest import report

DEVICES = [Candidate(device=f"d{i:02}", group="home" if i < 4 else None) for i in range(20)]


def changed(*devices: str) -> dict[str, PreviousState]:
    return {device: PreviousState(told_at=100.0) for device in devices}


# States.


@pytest.mark.parametrize("state", RolloutState)
@pytest.mark.parametrize("event", RolloutEvent)
def test_an_event_follows_the_table_or_raises_an_error_with_the_legal_events(
    state: RolloutState, event: RolloutEvent
) -> None:
    if (state, event) in LEGAL_EVENTS:
        assert next_rollout_state(7, state, event) is LEGAL_EVENTS[state, event]
    else:
        advice = "expected one of [a-z, ]+$" if state in OPEN else "it has ended; start another"
        with pytest.raises(
            RolloutError, match=f"cannot {event} roll-out 7, which is {state}: {advice}"
        ):
            next_rollout_state(7, state, event)


def test_every_open_roll_out_can_be_undone_and_an_ended_one_not_changed() -> None:
    assert (
        {state for state, event in LEGAL_EVENTS if event is RolloutEvent.UNDO}
        == set(OPEN)
        == {state for state, _ in LEGAL_EVENTS}
    )


# Stages.


def test_stages_grow_from_the_canary_to_all() -> None:
    progress = RolloutProgress(RolloutPlan(canary=1))
    stage = 0
    sizes = []
    while (found := next_stage(progress, stage, DEVICES))[1]:
        stage, new = found
        progress = msgspec.structs.replace(progress, members=progress.members | changed(*new))
        sizes.append((stage, len(progress.members)))
    assert sizes == [(1, 1), (2, 2), (3, 10), (4, 20)]
    assert stage == progress.plan.num_stages


def test_a_stage_that_adds_no_device_is_passed_over() -> None:
    assert next_stage(RolloutProgress(RolloutPlan(), changed("d00")), 1, DEVICES[:3]) == (
        3,
        ["d01"],
    )


def test_after_the_last_device_the_stages_end() -> None:
    assert next_stage(RolloutProgress(RolloutPlan(), changed("d00")), 1, DEVICES[:1]) == (5, [])


def test_devices_that_are_online_come_first() -> None:
    away = replace(DEVICES[0], online=False)
    assert next_stage(RolloutProgress(RolloutPlan(canary=2)), 0, [away, *DEVICES[1:]]) == (
        1,
        ["d01", "d02"],
    )


def test_a_named_group_is_the_canary() -> None:
    assert next_stage(RolloutProgress(RolloutPlan(canary_group="home")), 0, DEVICES) == (
        1,
        ["d00", "d01", "d02", "d03"],
    )


def test_a_device_that_was_enrolled_meanwhile_is_in_the_last_stage() -> None:
    members = changed(*(each.device for each in DEVICES))
    assert next_stage(
        RolloutProgress(RolloutPlan(), members), 3, [*DEVICES, Candidate(device="late")]
    ) == (4, ["late"])


def test_as_many_others_as_the_canary_has_devices_are_compared_with_and_only_once() -> None:
    progress = RolloutProgress(RolloutPlan(canary=2))
    assert controls_for(progress, DEVICES, ["d00", "d01"]) == ["d02", "d03"]
    assert (
        controls_for(RolloutProgress(RolloutPlan(), controls=changed("d02")), DEVICES, ["d00"])
        == []
    )
    assert controls_for(RolloutProgress(RolloutPlan(agreement_sample=0.0)), DEVICES, ["d00"]) == []


@pytest.mark.parametrize("stages", [(), (50,), (50, 10, 100), (10, 10, 100)])
def test_stages_that_do_not_grow_to_all_are_refused(stages: tuple[int, ...]) -> None:
    with pytest.raises(RolloutError, match="growing percentages that end with 100"):
        check_plan(RolloutPlan(percentages=stages))


@pytest.mark.parametrize(
    "plan",
    [
        RolloutPlan(canary=0),
        RolloutPlan(percentages=(0, 100)),
        RolloutPlan(observe_s=0.0),
        RolloutPlan(limits=CanaryLimits(max_error_rate=2.0)),
    ],
)
def test_a_plan_out_of_range_is_refused(plan: RolloutPlan) -> None:
    with pytest.raises(RolloutError, match="plan is not usable"):
        check_plan(plan)


def test_a_canary_outside_of_the_roll_outs_group_is_refused() -> None:
    with pytest.raises(RolloutError, match="'lab' is not in the group 'home'"):
        check_plan(RolloutPlan(group="home", canary_group="lab"))


# Outcomes: the settings changed at 100, as the stage began; a device may install the bundle within
# 1800 s, and is gone after 120 s offline.


def device(bundle_id: str, last_seen: float | None = None) -> Candidate:
    """Return a device that serves a bundle, and is offline when `last_seen` is given."""
    online = last_seen is None
    return Candidate(device="d", bundle_id=bundle_id, online=online, last_seen=last_seen or 0.0)


def failing(bundle_id: str, message: str, *, is_final: bool = True) -> Candidate:
    """Return an online device that publishes a problem."""
    problem = ConfigProblem("bad_bundle", message, is_final)
    return Candidate(device="d", bundle_id=bundle_id, problem=problem)


def outcome_at(
    candidate: Candidate, now: float, *, receiving_since: float = 0.0, **previous: Any
) -> ReasonedOutcome:
    clock = RolloutClock(now, 100.0, receiving_since)
    state = PreviousState(told_at=100.0, **previous)
    return outcome_of(candidate, state, "new", RolloutPlan(), clock)


@pytest.mark.parametrize(
    ("candidate", "now", "outcome", "reason"),
    [
        (device("old"), 150.0, DeviceOutcome.PENDING, ""),
        (device("old"), 1900.0, DeviceOutcome.FAILED, "d has not installed the bundle within 1800"),
        (device("new"), 150.0, DeviceOutcome.TAKEN, ""),
        (device("new"), 9999.0, DeviceOutcome.TAKEN, ""),
        (failing("old", "no room"), 150.0, DeviceOutcome.FAILED, "d reports: no room"),
        (device("new", 200.0), 250.0, DeviceOutcome.TAKEN, ""),
        (device("new", 200.0), 320.0, DeviceOutcome.FAILED, "d went offline with the bundle"),
        (device("old", 200.0), 320.0, DeviceOutcome.PENDING, ""),
        (device("old", 200.0), 1900.0, DeviceOutcome.FAILED, "d has not installed the bundle"),
        (device("old", 50.0), 171.0, DeviceOutcome.ABSENT, ""),
        (device("old", 50.0), 1900.0, DeviceOutcome.ABSENT, ""),
    ],
)
def test_the_outcome_on_a_device_follows_from_its_newest_status(
    candidate: Candidate, now: float, outcome: DeviceOutcome, reason: str
) -> None:
    result = outcome_at(candidate, now)
    assert result.outcome is outcome
    assert result.reason.startswith(reason)
    assert bool(result.reason) is (outcome is DeviceOutcome.FAILED)


def test_a_problem_from_before_the_change_is_not_the_bundles() -> None:
    candidate = failing("new", "bad thresholds")
    result = outcome_at(candidate, 150.0, error="bad thresholds")
    assert result.outcome is DeviceOutcome.TAKEN


def test_a_problem_that_is_not_final_is_no_failure_before_the_time_is_over() -> None:
    candidate = failing("old", "the registry is away", is_final=False)
    assert outcome_at(candidate, 150.0).outcome is DeviceOutcome.PENDING
    assert outcome_at(candidate, 5000.0).outcome is DeviceOutcome.FAILED


def test_no_device_is_gone_before_a_restarted_server_could_receive_its_status() -> None:
    candidate = device("new", 200.0)
    assert outcome_at(candidate, 900.0, receiving_since=850.0).outcome is DeviceOutcome.TAKEN
    assert outcome_at(candidate, 990.0, receiving_since=850.0).outcome is DeviceOutcome.FAILED


def test_a_device_that_reconnects_has_its_full_time_from_then_on() -> None:
    candidate = Candidate(device="d", bundle_id="old", last_seen=5000.0)
    assert outcome_at(candidate, 5100.0, online=False).outcome is DeviceOutcome.PENDING
    assert outcome_at(candidate, 6801.0, online=False).outcome is DeviceOutcome.FAILED


P = ReasonedOutcome(DeviceOutcome.PENDING)
T = ReasonedOutcome(DeviceOutcome.TAKEN)
F = ReasonedOutcome(DeviceOutcome.FAILED, "d reports: no room")
A = ReasonedOutcome(DeviceOutcome.ABSENT)


@pytest.mark.parametrize(
    ("outcomes", "now", "step", "reason"),
    [
        ([P], 101.0, RolloutStep.WAIT, "0 of 1 devices have installed the bundle"),
        ([T, P], 101.0, RolloutStep.WAIT, "1 of 2 devices have installed the bundle"),
        ([T, T], 101.0, RolloutStep.WATCH, "2 of 2 devices have installed the bundle"),
        ([T, A], 101.0, RolloutStep.WATCH, "1 of 2 devices have installed the bundle"),
        ([F], 101.0, RolloutStep.UNDO, "d reports: no room"),
        ([F, P, P], 101.0, RolloutStep.UNDO, "d reports: no room (1 of 3 devices failed)"),
        ([F, *[T] * 9], 101.0, RolloutStep.WATCH, "9 of 10"),
        ([F, F, *[T] * 9], 101.0, RolloutStep.UNDO, "d reports: no room (2 of 11 devices failed)"),
        ([A, A], 101.0, RolloutStep.WAIT, "its devices are offline"),
        ([A, A], 1900.0, RolloutStep.FAIL, "no device was online to install the bundle within"),
    ],
)
def test_the_step_while_devices_install_the_bundle_follows_from_their_outcomes(
    outcomes: list[ReasonedOutcome], now: float, step: RolloutStep, reason: str
) -> None:
    decision = decide_step(
        RolloutProgress(RolloutPlan()),
        {f"d{i}": outcome for i, outcome in enumerate(outcomes)},
        RolloutClock(now, 100.0),
    )
    assert decision.step is step
    assert decision.reason.startswith(reason)


WORSE, UNSURE, FINE = (
    Finding(outcome, f"{outcome} it is")
    for outcome in (Outcome.WORSE, Outcome.UNSURE, Outcome.FINE)
)


@pytest.mark.parametrize(
    ("findings", "num_answers", "watched_s", "step", "reason"),
    [
        ([FINE], 50, 599.0, RolloutStep.WAIT, "watched for 599 of 600 s"),
        ([], 19, 600.0, RolloutStep.WAIT, "19 of 20 answers"),
        ([FINE], 20, 600.0, RolloutStep.ADVANCE, "no worse than before"),
        (
            [FINE, UNSURE],
            20,
            600.0,
            RolloutStep.WAIT,
            "not enough answers to decide: unsure it is",
        ),
        ([FINE, WORSE], 20, 10.0, RolloutStep.UNDO, "worse it is"),
    ],
)
def test_the_step_of_a_watched_stage_follows_from_its_findings(
    findings: list[Finding], num_answers: int, watched_s: float, step: RolloutStep, reason: str
) -> None:
    assert judge(RolloutPlan(), findings, num_answers, watched_s) == RolloutDecision(step, reason)


# Evidence.


def test_wilsons_interval_is_that_of_the_paper() -> None:
    """Newcombe 1998, table I: 81 of 263 and 1 of 29, at 95% on both sides."""
    assert wilson(ShareSample(81 / 263, 263), 1.959964) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(ShareSample(1 / 29, 29), 1.959964) == pytest.approx((0.0061, 0.1718), abs=1e-4)
    assert wilson(ShareSample(0.0, 0), FINAL_Z) == (0.0, 1.0)


def test_the_bound_of_a_difference_is_that_of_the_paper() -> None:
    """Newcombe 1998, table II: 56 of 70 less 48 of 80 is 0.2, from 0.0524 on."""
    assert increase_bound(
        ShareSample(56 / 70, 70), ShareSample(48 / 80, 80), 1.959964
    ) == pytest.approx(0.0524, abs=1e-4)


def test_a_shares_bound_is_lower_before_the_end_of_the_observation() -> None:
    assert (
        wilson(ShareSample(0.2, 40), INTERIM_Z)[0] < wilson(ShareSample(0.2, 40), FINAL_Z)[0] < 0.2
    )


def test_the_share_of_a_histogram_above_a_time() -> None:
    counts = [0] * 32
    counts[bucket(5.0)] += 3  # from 4 ms to 5.66 ms
    counts[bucket(100.0)] += 1
    counts[-1] += 1
    assert share_above(counts, 4.0) == 1.0
    assert share_above(counts, 2**2.25 + 0.0) == pytest.approx(
        (2 + 3 * (2**2.5 - 2**2.25) / (2**2.5 - 4)) / 5
    )
    assert share_above(counts, 60.0) == pytest.approx(0.4)
    assert share_above([0] * 32, 60.0) == 0.0


def counted(answers: int, **changes: object) -> Counter[str]:
    aggregate = ReportAggregate()
    for i in range(answers):
        aggregate.add(report(f"g{i}", **changes))
    return Counter(aggregate.columns())


def cloud(tokens: int) -> dict[str, object]:
    """Return counts of ten tokens, `tokens` of them from the cloud."""
    return {"sources": {"cloud": tokens, "exit:8": 10 - tokens}}


OLD = counted(100, **cloud(2), judged=5, agreed=5)
NOTHING: Counter[str] = Counter()


@pytest.mark.parametrize(
    ("new", "outcomes"),
    [
        (counted(19, **cloud(10)), []),
        (counted(20, **cloud(2), judged=5, agreed=5), ["fine"] * 5),
        (counted(20, **cloud(9)), ["worse", "fine", "fine", "fine"]),
        (counted(20, **cloud(4)), ["unsure", "fine", "fine", "fine"]),
        (counted(200, **cloud(4)), ["worse", "fine", "fine", "fine"]),
        (counted(20, **cloud(2), judged=5, agreed=3), ["fine", "worse", "fine", "fine", "fine"]),
        (counted(20, **cloud(2), judged=50, agreed=46), ["fine", "unsure", "fine", "fine", "fine"]),
        (counted(20, **cloud(2), finish_reason="error"), ["fine", "worse", "fine", "fine"]),
        (counted(20, **cloud(2), tpot_ms=50.0), ["fine", "fine", "worse", "worse"]),
    ],
)
def test_each_limit_is_evaluated_from_the_answers(new: Counter[str], outcomes: list[str]) -> None:
    findings = examine(Evidence(new, OLD, NOTHING), CanaryLimits(), is_final=True)
    assert [each.outcome for each in findings] == outcomes


def test_the_same_devices_are_compared_with_before_others() -> None:
    others = counted(100, **cloud(9))
    (finding, *_) = examine(
        Evidence(counted(20, **cloud(9)), OLD, others), CanaryLimits(), is_final=True
    )
    assert finding == (Outcome.WORSE, "offload 90.0%, before 20.0%, limit 10.0% more")
    (finding, *_) = examine(
        Evidence(counted(20, **cloud(9)), counted(3, **cloud(0)), others),
        CanaryLimits(),
        is_final=True,
    )
    assert finding == (Outcome.FINE, "offload 90.0%, before 90.0%, limit 10.0% more")


def test_without_a_baseline_only_errors_are_judged() -> None:
    findings = examine(
        Evidence(counted(20, **cloud(9)), NOTHING, NOTHING), CanaryLimits(), is_final=True
    )
    assert findings == [Finding(Outcome.FINE, "errors 0.0%, limit 5.0%")]


def test_a_bundle_may_fail_as_often_as_the_one_before_it() -> None:
    old = counted(100, finish_reason="error")
    assert Outcome.WORSE not in [
        each.outcome
        for each in examine(
            Evidence(counted(20, finish_reason="error"), old, NOTHING),
            CanaryLimits(),
            is_final=True,
        )
    ]


def test_judged_tokens_are_as_many_observations_as_the_answers_that_they_would_fill() -> None:
    def outcomes(judged: int) -> list[str]:
        new = counted(40, **cloud(2), judged=judged, agreed=0)
        return [
            each.text
            for each in examine(Evidence(new, OLD, NOTHING), CanaryLimits(), is_final=True)
        ]

    assert not any(text.startswith("agreement") for text in outcomes(1))  # 4 of 40 answers' worth
    assert any(text.startswith("agreement") for text in outcomes(2))


def test_a_quantile_of_few_earlier_answers_is_taken_where_it_may_be_at_the_most() -> None:
    few, many = (counted(6 * n, tpot_ms=5.0) + counted(4 * n, tpot_ms=20.0) for n in (2, 200))
    new = counted(20, tpot_ms=20.0)
    outcomes = [
        [
            each.outcome
            for each in examine(Evidence(new, old, NOTHING), CanaryLimits(), is_final=True)
        ][-2]
        for old in (few, many)
    ]
    assert outcomes == [Outcome.UNSURE, Outcome.WORSE]


def test_a_value_beyond_its_limit_decides_after_enough_observations() -> None:
    outcomes = [
        examine(Evidence(counted(n, **cloud(4)), OLD, NOTHING), CanaryLimits(), is_final=True)[
            0
        ].outcome
        for n in (20, 199, 200)
    ]
    assert outcomes[0] is Outcome.UNSURE
    assert outcomes[2] is Outcome.WORSE
