"""A calibrated guarantee holds on new text, and too few answers are refused."""

from __future__ import annotations

import numpy as np
import pytest

from fleet.errors import ConfigError
from fleet.exits.calibration import (
    answer_losses,
    answers_needed,
    calibrate,
    expected_calibration_error,
    fit_platt,
    p_value,
    scale_confidence,
)
from fleet.exits.records import Floats, Records
from fleet.exits.thresholds import OFF, evaluate_thresholds


def make_answers(num_answers: int, seed: int) -> Records:
    """Return answers of 20 tokens, easy ones and hard ones.

    The tokens of one answer depend on each other.
    """
    random = np.random.default_rng(seed)
    ease = np.repeat(random.beta(3, 1, num_answers), 20)
    n = len(ease)
    confidence = np.column_stack([np.clip(random.beta(4 * ease + 0.2, 2), 0, 1) for _ in range(2)])
    agrees = random.random((n, 2)) < np.column_stack(
        [0.3 + 0.7 * confidence[:, 0] * ease, 0.2 + 0.8 * confidence[:, 1] * ease]
    )
    return Records((8, 15), np.repeat(np.arange(num_answers), 20), confidence, agrees)


def losses_with_mean(mean: float, size: int, random: np.random.Generator) -> Floats:
    """Return losses in [0, 1]: many zeros, some large."""
    losses: Floats = (random.random(size) < 2 * mean) * random.random(size)
    return losses


def test_a_true_hypothesis_is_rejected_as_rarely_as_promised() -> None:
    random = np.random.default_rng(0)
    rejected = sum(p_value(losses_with_mean(0.05, 300, random), 0.05) <= 0.1 for _ in range(1000))
    assert rejected <= 100 + 3 * 9.5  # 10% of 1000, and three standard deviations


def test_a_false_hypothesis_is_rejected_with_enough_answers() -> None:
    random = np.random.default_rng(1)
    few, many = (
        sum(p_value(losses_with_mean(0.01, size, random), 0.05) <= 0.05 for _ in range(100))
        for size in (60, 400)
    )
    assert many == 100
    assert few < many


def test_the_promise_holds_on_answers_that_calibration_never_saw() -> None:
    target = 0.9
    fresh = make_answers(5000, seed=999)
    kept = 0
    rates = []
    for seed in range(30):
        thresholds, _ = calibrate(make_answers(300, seed), target, 0.9)
        kept += 1 - answer_losses(fresh, thresholds).mean() >= target
        rates.append(evaluate_thresholds(fresh, thresholds).offload_rate)
    assert kept >= 27 - 3 * 1.64  # 90% of 30, less three standard deviations
    assert np.mean(rates) < 0.97  # and the guarantee is not empty


def test_too_few_answers_are_refused_with_the_number_that_it_takes() -> None:
    needed = answers_needed(0.98, 0.95)
    assert 150 < needed < 400
    with pytest.raises(
        ConfigError, match=rf"20 answers are too few .*at least {needed} are needed"
    ):
        calibrate(make_answers(20, 0), 0.98, 0.95)
    perfect = make_answers(needed, 0)
    perfect.agrees[:] = True
    thresholds, _ = calibrate(perfect, 0.98, 0.95)
    assert min(thresholds) < OFF


@pytest.mark.parametrize(
    ("target", "confidence"), [(1.0, 0.9), (0.0, 0.9), (0.9, 1.0), (float("nan"), 0.9)]
)
def test_targets_that_cannot_be_promised_are_refused(target: float, confidence: float) -> None:
    with pytest.raises(ConfigError, match="expected a number between 0 and 1"):
        calibrate(make_answers(300, 0), target, confidence)


def test_exits_that_are_never_right_are_switched_off() -> None:
    wrong = make_answers(300, 0)
    wrong.agrees[:] = False
    thresholds, calibration = calibrate(wrong, 0.98, 0.95)
    assert thresholds == (OFF, OFF)
    assert calibration.exits["8"].agreement == 0


def test_scaling_brings_confidence_to_agreement_and_keeps_the_order() -> None:
    random = np.random.default_rng(0)
    confidence = random.beta(2, 1, 20_000)
    agrees = random.random(20_000) < confidence**3
    before = expected_calibration_error(confidence, agrees)
    slope, intercept = fit_platt(confidence[:10_000], agrees[:10_000])
    scaled = scale_confidence(confidence[10_000:], slope, intercept)
    assert slope > 0
    assert expected_calibration_error(scaled, agrees[10_000:]) < before / 4
    assert (np.argsort(scaled) == np.argsort(confidence[10_000:])).all()


def test_the_calibration_error_of_honest_confidence_is_small() -> None:
    random = np.random.default_rng(0)
    confidence = random.random(50_000)
    assert expected_calibration_error(confidence, random.random(50_000) < confidence) < 0.01
    assert expected_calibration_error(np.ones(100), np.zeros(100, bool)) == 1.0
