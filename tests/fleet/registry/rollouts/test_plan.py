"""What a roll-out does next, decided from values: tables of stages, fates, evidence and states."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from fleet.errors import RolloutError
from fleet.protocol.report import NOT_YET
from fleet.registry.rollouts.canary_analysis import (
    FINAL_Z,
    LOOK_Z,
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
    RolloutClock,
    RolloutDecision,
    RolloutPlan,
    RolloutProgress,
    RolloutStep,
    check_plan,
    controls_for,
    decide,
    fate_of,
    judge,
    next_stage,
)
from fleet.registry.rollouts.states import LEGAL, OPEN, RolloutEvent, RolloutState, next_state
from fleet.registry.stats.aggregate import Tally, bucket
from tests.fleet.conftest import report

DEVICES = [Candidate(f"d{i:02}", "home" if i < 4 else None) for i in range(20)]


def told(*devices: str) -> dict[str, PreviousState]:
    return {device: PreviousState(told_at=100.0) for device in devices}


# States.


@pytest.mark.parametrize("state", RolloutState)
@pytest.mark.parametrize("event", RolloutEvent)
def test_a_change_is_as_the_table_says_or_an_error_that_names_what_is_legal(
    state: RolloutState, event: RolloutEvent
) -> None:
    if (state, event) in LEGAL:
        assert next_state(7, state, event) is LEGAL[state, event]
    else:
        with pytest.raises(
            RolloutError, match=f"cannot {event} roll-out 7, which is {state}: expected one of"
        ):
            next_state(7, state, event)


def test_every_open_roll_out_can_be_undone_and_an_ended_one_not_changed() -> None:
    assert (
        {state for state, event in LEGAL if event is RolloutEvent.UNDO}
        == set(OPEN)
        == {state for state, _ in LEGAL}
    )


# Stages.


def test_stages_grow_from_the_canary_to_all() -> None:
    course = RolloutProgress(RolloutPlan(canary=1))
    stage = 0
    sizes = []
    while (found := next_stage(course, stage, DEVICES))[1]:
        stage, new = found
        course = msgspec.structs.replace(course, members=course.members | told(*new))
        sizes.append((stage, len(course.members)))
    assert sizes == [(1, 1), (2, 2), (3, 10), (4, 20)]
    assert stage == course.plan.num_stages


def test_a_stage_that_adds_no_device_is_passed_over() -> None:
    assert next_stage(RolloutProgress(RolloutPlan(), told("d00")), 1, DEVICES[:3]) == (3, ["d01"])


def test_behind_the_last_device_comes_the_end() -> None:
    assert next_stage(RolloutProgress(RolloutPlan(), told("d00")), 1, DEVICES[:1]) == (5, [])


def test_devices_that_are_online_come_first() -> None:
    away = DEVICES[0]._replace(online=False)
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
    members = told(*(each.device for each in DEVICES))
    assert next_stage(
        RolloutProgress(RolloutPlan(), members), 3, [*DEVICES, Candidate("late")]
    ) == (4, ["late"])


def test_as_many_others_as_the_canary_has_devices_are_compared_with_and_only_once() -> None:
    course = RolloutProgress(RolloutPlan(canary=2))
    assert controls_for(course, DEVICES, ["d00", "d01"]) == ["d02", "d03"]
    assert (
        controls_for(RolloutProgress(RolloutPlan(), controls=told("d02")), DEVICES, ["d00"]) == []
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


# Devices: told at 100; the stage began then, and 1800 s are there to take the bundle; gone is 120 s offline.


@pytest.mark.parametrize(
    ("seen", "now", "fate", "why"),
    [
        (Candidate("d", bundle_id="old"), 150.0, DeviceOutcome.PENDING, ""),
        (Candidate("d", bundle_id="old"), 1900.0, DeviceOutcome.FAILED, "d has not taken it within 1800 s"),
        (Candidate("d", bundle_id="new"), 150.0, DeviceOutcome.TAKEN, ""),
        (Candidate("d", bundle_id="new"), 9999.0, DeviceOutcome.TAKEN, ""),
        (Candidate("d", bundle_id="old", error="no room"), 150.0, DeviceOutcome.FAILED, "d reports: no room"),
        (Candidate("d", bundle_id="new", online=False, last_seen=200.0), 250.0, DeviceOutcome.TAKEN, ""),
        (
            Candidate("d", bundle_id="new", online=False, last_seen=200.0), 320.0, DeviceOutcome.FAILED,
            "d took it and went offline",
        ),
        (Candidate("d", bundle_id="old", online=False, last_seen=200.0), 320.0, DeviceOutcome.PENDING, ""),
        (Candidate("d", bundle_id="old", online=False, last_seen=200.0), 1900.0, DeviceOutcome.FAILED, "d has not taken it"),
        (Candidate("d", bundle_id="old", online=False, last_seen=50.0), 171.0, DeviceOutcome.ABSENT, ""),
        (Candidate("d", bundle_id="old", online=False, last_seen=50.0), 1900.0, DeviceOutcome.ABSENT, ""),
    ],
)  # fmt: skip
def test_what_becomes_of_the_bundle_on_a_device(
    seen: Candidate, now: float, fate: DeviceOutcome, why: str
) -> None:
    got = fate_of(
        seen, PreviousState(told_at=100.0), "new", RolloutPlan(), RolloutClock(now, 100.0)
    )
    assert got[0] is fate
    assert got[1].startswith(why)
    assert bool(got[1]) is (fate is DeviceOutcome.FAILED)


def test_an_error_that_a_device_had_before_it_was_told_is_not_the_bundles() -> None:
    seen = Candidate("d", bundle_id="new", error="bad thresholds")
    assert (
        fate_of(
            seen,
            PreviousState(told_at=100.0, error="bad thresholds"),
            "new",
            RolloutPlan(),
            RolloutClock(150.0, 100.0),
        )[0]
        is DeviceOutcome.TAKEN
    )


def test_an_error_that_passes_is_waited_for() -> None:
    seen = Candidate("d", error=f"{NOT_YET}the registry is away; it is tried again")
    assert (
        fate_of(
            seen, PreviousState(told_at=100.0), "new", RolloutPlan(), RolloutClock(150.0, 100.0)
        )[0]
        is DeviceOutcome.PENDING
    )
    assert (
        fate_of(
            seen, PreviousState(told_at=100.0), "new", RolloutPlan(), RolloutClock(5000.0, 100.0)
        )[0]
        is DeviceOutcome.FAILED
    )


def test_nobody_is_gone_before_a_server_that_has_just_started_could_hear_them() -> None:
    seen = Candidate("d", bundle_id="new", online=False, last_seen=200.0)
    assert (
        fate_of(
            seen,
            PreviousState(told_at=100.0),
            "new",
            RolloutPlan(),
            RolloutClock(900.0, 100.0, heard_since=850.0),
        )[0]
        is DeviceOutcome.TAKEN
    )
    assert (
        fate_of(
            seen,
            PreviousState(told_at=100.0),
            "new",
            RolloutPlan(),
            RolloutClock(990.0, 100.0, heard_since=850.0),
        )[0]
        is DeviceOutcome.FAILED
    )


def test_a_device_that_comes_back_has_its_time_from_then_on() -> None:
    back = Candidate("d", bundle_id="old", last_seen=5000.0)
    assert (
        fate_of(
            back,
            PreviousState(told_at=100.0, online=False),
            "new",
            RolloutPlan(),
            RolloutClock(5100.0, 100.0),
        )[0]
        is DeviceOutcome.PENDING
    )
    assert (
        fate_of(
            back,
            PreviousState(told_at=100.0, online=False),
            "new",
            RolloutPlan(),
            RolloutClock(6801.0, 100.0),
        )[0]
        is DeviceOutcome.FAILED
    )


P = (DeviceOutcome.PENDING, "")
T = (DeviceOutcome.TAKEN, "")
F = (DeviceOutcome.FAILED, "d reports: no room")
A = (DeviceOutcome.ABSENT, "")


@pytest.mark.parametrize(
    ("fates", "now", "step", "reason"),
    [
        ([P], 101.0, RolloutStep.WAIT, "0 of 1 devices have taken it"),
        ([T, P], 101.0, RolloutStep.WAIT, "1 of 2 devices have taken it"),
        ([T, T], 101.0, RolloutStep.WATCH, "2 of 2 devices have taken it"),
        ([T, A], 101.0, RolloutStep.WATCH, "1 of 2 devices have taken it"),
        ([F], 101.0, RolloutStep.UNDO, "d reports: no room"),
        ([F, P, P], 101.0, RolloutStep.UNDO, "d reports: no room (1 of 3 devices failed)"),
        ([F, *[T] * 9], 101.0, RolloutStep.WATCH, "9 of 10"),
        ([F, F, *[T] * 9], 101.0, RolloutStep.UNDO, "d reports: no room (2 of 11 devices failed)"),
        ([A, A], 101.0, RolloutStep.WAIT, "its devices are offline"),
        ([A, A], 1900.0, RolloutStep.FAIL, "no device was there to take it within 1800 s"),
    ],
)
def test_what_follows_while_devices_take_the_bundle(
    fates: list[tuple[DeviceOutcome, str]], now: float, step: RolloutStep, reason: str
) -> None:
    got = decide(
        RolloutProgress(RolloutPlan()),
        {f"d{i}": fate for i, fate in enumerate(fates)},
        RolloutClock(now, 100.0),
    )
    assert got.step is step
    assert got.reason.startswith(reason)


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
            "not enough answers to be sure: unsure it is",
        ),
        ([FINE, WORSE], 20, 10.0, RolloutStep.UNDO, "worse it is"),
    ],
)
def test_what_follows_from_what_was_watched(
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


def test_a_shares_bound_lets_more_pass_while_one_still_looks() -> None:
    assert wilson(ShareSample(0.2, 40), LOOK_Z)[0] < wilson(ShareSample(0.2, 40), FINAL_Z)[0] < 0.2


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
    made = Tally()
    for i in range(answers):
        made.add(report(f"g{i}", **changes))
    return made.counts


def cloud(tokens: int) -> dict[str, object]:
    """Of ten tokens so many came from the cloud."""
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
def test_what_answers_say_of_a_bundle(new: Counter[str], outcomes: list[str]) -> None:
    found = examine(Evidence(new, OLD, NOTHING), CanaryLimits(), is_final=True)
    assert [each.outcome for each in found] == outcomes


def test_what_the_same_devices_did_goes_before_what_others_do() -> None:
    others = counted(100, **cloud(9))
    (found, *_) = examine(
        Evidence(counted(20, **cloud(9)), OLD, others), CanaryLimits(), is_final=True
    )
    assert found == (Outcome.WORSE, "offload 90.0%, before 20.0%, limit 10.0% more")
    (found, *_) = examine(
        Evidence(counted(20, **cloud(9)), counted(3, **cloud(0)), others),
        CanaryLimits(),
        is_final=True,
    )
    assert found == (Outcome.FINE, "offload 90.0%, before 90.0%, limit 10.0% more")


def test_where_there_is_nothing_to_compare_with_only_errors_are_judged() -> None:
    found = examine(
        Evidence(counted(20, **cloud(9)), NOTHING, NOTHING), CanaryLimits(), is_final=True
    )
    assert found == [Finding(Outcome.FINE, "errors 0.0%, limit 5.0%")]


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
    said = [
        [
            each.outcome
            for each in examine(Evidence(new, old, NOTHING), CanaryLimits(), is_final=True)
        ][-2]
        for old in (few, many)
    ]
    assert said == [Outcome.UNSURE, Outcome.WORSE]


def test_a_value_beyond_its_limit_is_watched_on_and_decides_at_last() -> None:
    outcomes = [
        examine(Evidence(counted(n, **cloud(4)), OLD, NOTHING), CanaryLimits(), is_final=True)[
            0
        ].outcome
        for n in (20, 199, 200)
    ]
    assert outcomes[0] is Outcome.UNSURE
    assert outcomes[2] is Outcome.WORSE
