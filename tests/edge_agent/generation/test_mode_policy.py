"""Auto mode's decisions, as tables."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from edge_agent.generation.mode_controller import PROBE_TOKENS, ModeController
from edge_agent.generation.mode_policy import (
    MIN_JUDGED,
    MIN_TOKENS,
    MIN_WAIT_MS,
    Targets,
    decide_mode,
    predict,
    wait_ms,
)
from edge_agent.measurements import Measurements, Snapshot
from fleet.protocol.modes import Mode

ALONE = Mode.STANDALONE
TOGETHER = Mode.COLLABORATIVE
VERIFIED = Mode.VERIFIED


def measured(
    round_trip_ms: float = 15,
    *,
    step_ms: float = 20,
    below_threshold: float = 0.6,
    confidence: float = 0.7,
    emitted_confidence: float = 0.97,
) -> Snapshot:
    return Snapshot(
        step_s=step_ms / 1000,
        round_trip_s=round_trip_ms / 1000,
        num_round_trips=20,
        below_threshold=below_threshold,
        confidence=confidence,
        emitted_confidence=emitted_confidence,
        num_choices=40,
    )


TABLE = [
    # round trip, targets, present mode -> decision
    (15, Targets(min_agreement=0.95), TOGETHER, TOGETHER),
    (200, Targets(min_agreement=0.95), TOGETHER, VERIFIED),
    (15, Targets(min_agreement=1.0), TOGETHER, VERIFIED),
    (15, Targets(min_agreement=0.99, promised_agreement=0.98), TOGETHER, VERIFIED),
    (15, Targets(min_agreement=0.995, promised_agreement=0.998), TOGETHER, TOGETHER),
    (15, Targets(min_agreement=0.5), TOGETHER, ALONE),
    (15, Targets(), TOGETHER, ALONE),
    (15, Targets(min_agreement=0.5, target_tpot_ms=60), TOGETHER, VERIFIED),
    (300, Targets(min_agreement=0.5, target_tpot_ms=60), TOGETHER, ALONE),
    (300, Targets(min_agreement=0.95, target_tpot_ms=60), TOGETHER, VERIFIED),
    (15, Targets(min_agreement=0.5, max_offload_rate=0.4), TOGETHER, ALONE),
    (15, Targets(min_agreement=0.95, max_offload_rate=0.4), TOGETHER, VERIFIED),
]


@pytest.mark.parametrize(("round_trip_ms", "targets", "current", "expected"), TABLE)
def test_the_decision_follows_from_measurements_and_targets(
    round_trip_ms: float, targets: Targets, current: Mode, expected: Mode
) -> None:
    decision = decide_mode(measured(round_trip_ms), targets, current, 100, is_link_up=True)
    assert decision.mode is expected, decision.reason
    assert (decision.reason == "as before") == (expected is current)


def test_nothing_measured_means_collaborating_which_measures_most() -> None:
    assert decide_mode(Snapshot(), Targets(), VERIFIED, 100, is_link_up=True).mode is TOGETHER


@pytest.mark.parametrize("current", [TOGETHER, VERIFIED, ALONE])
def test_without_the_link_it_is_alone_at_once(current: Mode) -> None:
    assert (
        decide_mode(measured(), Targets(min_agreement=0.95), current, 0, is_link_up=False).mode
        is ALONE
    )


def test_without_the_link_an_exact_text_waits() -> None:
    assert (
        decide_mode(measured(), Targets(min_agreement=1.0), TOGETHER, 0, is_link_up=False).mode
        is VERIFIED
    )


def test_no_switch_soon_after_another() -> None:
    slow = measured(200)
    assert (
        decide_mode(
            slow, Targets(min_agreement=0.95), TOGETHER, MIN_TOKENS - 1, is_link_up=True
        ).mode
        is TOGETHER
    )
    assert (
        decide_mode(slow, Targets(min_agreement=0.95), TOGETHER, MIN_TOKENS, is_link_up=True).mode
        is VERIFIED
    )


def test_what_verifies_have_found_is_believed_instead_of_the_confidence() -> None:
    overconfident = replace(measured(200, confidence=0.95), acceptance=0.5, num_judged=MIN_JUDGED)
    assert predict(overconfident, Targets()) == predict(measured(200, confidence=0.5), Targets())
    few = replace(overconfident, num_judged=MIN_JUDGED - 1)
    assert predict(few, Targets()) == predict(measured(200, confidence=0.95), Targets())


@pytest.mark.parametrize("round_trip_ms", [10, 200])
def test_collaborating_saves_steps_and_round_trips_behind_right_guesses(
    round_trip_ms: float,
) -> None:
    taken = [
        predict(replace(measured(round_trip_ms), guess_acceptance=right), Targets())[
            TOGETHER
        ].tpot_s
        for right in (0.0, 0.5, 1.0)
    ]
    assert taken[0] == pytest.approx(0.020 + 0.6 * round_trip_ms / 1000)
    assert taken[0] > taken[1] > taken[2] > 0


def test_a_small_gain_is_no_reason() -> None:
    targets = Targets(min_agreement=0.95)
    together, verified = (
        predict(measured(60), targets)[mode].tpot_s for mode in (TOGETHER, VERIFIED)
    )
    assert 0.8 * together < verified < together
    assert decide_mode(measured(60), targets, TOGETHER, 100, is_link_up=True).mode is TOGETHER


def test_noise_at_the_border_does_not_make_it_flap() -> None:
    noise = random.Random(7)
    targets = Targets(min_agreement=0.95, target_tpot_ms=40)
    current = TOGETHER
    since = 0
    switches = 0
    for _ in range(1000):
        decision = decide_mode(
            measured(noise.uniform(25, 45)), targets, current, since, is_link_up=True
        )
        since += 1
        if decision.mode is not current:
            current = decision.mode
            since = 0
            switches = switches + 1
    assert switches <= 3


def test_a_reason_names_what_was_predicted() -> None:
    decision = decide_mode(
        measured(200), Targets(min_agreement=0.95), TOGETHER, 100, is_link_up=True
    )
    assert "ms a token predicted, collaborative 140" in decision.reason


def test_modes_follow_a_link_that_is_good_slow_gone_and_back() -> None:
    measurements = Measurements()
    modes = ModeController(Mode.AUTO, Targets(min_agreement=0.95), measurements, 3000)
    followed: list[Mode] = []
    for token in range(400):
        phase = token // 100
        followed.append(modes.at(token, is_link_up=phase != 2))
        measurements.step_done(0.02)
        measurements.token_chosen(0.97 if token % 5 < 2 else 0.5, is_emitted=token % 5 < 2)
        if phase != 2:
            measurements.round_trip_done({0: 0.015, 1: 0.25, 3: 0.015}[phase])
    assert set(followed[:100]) == {TOGETHER}
    assert followed[150] is VERIFIED
    assert set(followed[200:300]) == {ALONE}
    assert followed[300] is TOGETHER
    assert followed[399] is TOGETHER
    changes = [(switch.mode, switch.reason) for switch in modes.switches]
    assert [mode for mode, _ in changes] == [VERIFIED, ALONE, TOGETHER]
    assert [reason for _, reason in changes][1:] == ["the link is down", "the link is back"]


def test_a_device_that_is_alone_on_a_good_link_measures_it_now_and_then() -> None:
    modes = ModeController(Mode.AUTO, Targets(), Measurements(), 3000)
    measurements = modes._measurements
    measurements.step_done(0.02)
    measurements.token_chosen(0.5, is_emitted=False)
    measurements.round_trip_done(0.5)
    followed = [modes.at(token, is_link_up=True) for token in range(3 * PROBE_TOKENS)]
    assert followed[MIN_TOKENS:].count(TOGETHER) == 2
    assert len(modes.switches) == 1


@pytest.mark.parametrize(
    ("round_trip_ms", "spread_ms", "expected"),
    [(100, 50, 600), (1, 0, MIN_WAIT_MS), (900, 400, 3000)],
)
def test_an_assist_is_worth_a_few_round_trips(
    round_trip_ms: float, spread_ms: float, expected: int
) -> None:
    seen = Snapshot(
        round_trip_s=round_trip_ms / 1000, round_trip_spread_s=spread_ms / 1000, num_round_trips=5
    )
    assert wait_ms(seen, 3000) == expected
    assert wait_ms(Snapshot(), 3000) == 3000


@pytest.mark.parametrize(
    ("num_losses", "expected"), [(0, 600), (1, 1200), (2, 2400), (3, 3000), (10_000, 3000)]
)
def test_each_loss_doubles_the_wait(num_losses: int, expected: int) -> None:
    seen = Snapshot(
        round_trip_s=0.1, round_trip_spread_s=0.05, num_round_trips=5, num_losses=num_losses
    )
    assert wait_ms(seen, 3000) == expected
