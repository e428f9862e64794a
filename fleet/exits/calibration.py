"""Calibration: thresholds with a guarantee for new text, and confidences that match agreement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np

from fleet.errors import ConfigError
from fleet.exits.records import Bools, Floats, Records
from fleet.exits.thresholds import (
    AGREEMENTS,
    OFF,
    OperatingPoint,
    disagreements,
    emitting_exits,
    evaluate_thresholds,
    frontier,
)

METHOD: Final = "learn-then-test, betting"
LARGEST_BET: Final = 0.9
PATH_SHARE: Final = 0.4  # share of the answers that choose the thresholds to test on the others
NUM_BINS: Final = 15


class ExitCalibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Agreement of one exit, its expected calibration error, raw and scaled, and the scaling.

    Scaled confidence is sigmoid(slope * logit(confidence) + intercept). It keeps the order, so
    thresholds stay in raw confidence.
    """

    agreement: float
    ece: float
    scaled_ece: float
    slope: float
    intercept: float


class CurvePoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Thresholds with overall agreement, offload rate, and each exit's share of the tokens."""

    thresholds: tuple[float, ...]
    coverage: tuple[float, ...]
    agreement: float
    offload_rate: float


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Origin and guarantee of thresholds.

    An answer's mean agreement is at least `target_agreement`, with probability `confidence`.
    """

    method: str
    target_agreement: float
    confidence: float
    num_answers: int
    num_tokens: int
    prompts_sha256: tuple[str, ...]
    exits: dict[str, ExitCalibration]
    curve: tuple[CurvePoint, ...]


def calibrate(
    records: Records,
    target: float,
    confidence: float,
    prompts_sha256: Sequence[str] = (),
    seed: int = 0,
) -> tuple[tuple[float, ...], Calibration]:
    """Return one threshold for each exit with a guarantee, and the calibration.

    A new answer's expected agreement is at least `target`, with probability `confidence`. The
    method is Learn then Test (Angelopoulos et al., arXiv 2110.01052, as in CALM, arXiv 2207.07061):
    some answers give a path of thresholds from careful to bold; the others test them in that order,
    until one cannot be shown to keep `target` with error probability 1 - `confidence`. The unit is
    the answer, whose loss is the share of its tokens that are not the full model's: the tokens of
    one answer depend on each other.

    Raises:
        ConfigError: target or confidence is outside (0, 1), or there are too few answers; the
            message has the number that is needed.
    """
    check_guarantee(records.num_answers, target, confidence)
    path_records, test_records = records.split(PATH_SHARE, seed)
    thresholds: tuple[float, ...] = (OFF,) * len(records.exits)
    for point in frontier(path_records, path_agreements(target)):
        losses = answer_losses(test_records, point.thresholds)
        if p_value(losses, 1 - target, seed) > 1 - confidence:
            break
        thresholds = point.thresholds
    return thresholds, Calibration(
        method=METHOD,
        target_agreement=target,
        confidence=confidence,
        num_answers=records.num_answers,
        num_tokens=len(records),
        prompts_sha256=tuple(prompts_sha256),
        exits=calibrate_exits(path_records, test_records),
        curve=tuple(curve_point(records, point) for point in frontier(records)),
    )


def check_guarantee(num_answers: int, target: float, confidence: float) -> None:
    """Raise ConfigError when a guarantee is outside (0, 1) or needs more answers."""
    for name, value in (("target agreement", target), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ConfigError(f"{name} {value}: expected a number between 0 and 1, e.g. 0.98")
    num_needed = answers_needed(target, confidence)
    if num_answers < num_needed:
        raise ConfigError(
            f"{num_answers} answers are too few to promise agreement {target} "
            f"with confidence {confidence}: at least {num_needed} are needed; "
            "give more prompts, or a lower target or confidence"
        )


def path_agreements(target: float) -> list[float]:
    """Return the agreements of the thresholds to test, highest first, close ones near `target`."""
    half = (1 - target) / 2
    near = np.linspace(target - half, (1 + target) / 2, 41)
    return sorted({*AGREEMENTS, target, *near}, reverse=True)


def calibrate_exits(fit: Records, test: Records) -> dict[str, ExitCalibration]:
    """Calibrate each exit on `fit` and measure it on `test`; keys are layers."""
    return {
        str(layer): calibrate_exit(
            fit.confidence[:, i], fit.agrees[:, i], test.confidence[:, i], test.agrees[:, i]
        )
        for i, layer in enumerate(fit.exits)
    }


def curve_point(records: Records, point: OperatingPoint) -> CurvePoint:
    """Return a point with each exit's share of the tokens."""
    source = emitting_exits(records, point.thresholds)
    coverage = tuple(round(float((source == i).mean()), 4) for i in range(len(records.exits)))
    thresholds = tuple(round(threshold, 6) for threshold in point.thresholds)
    return CurvePoint(thresholds, coverage, round(point.agreement, 4), round(point.offload_rate, 4))


def answers_needed(target: float, confidence: float) -> int:
    """Return the least number of answers that can show `target`: no tested one has a mistake."""
    growth = math.log1p(LARGEST_BET * (1 - target) / target)
    num_tested = math.log(1 / (1 - confidence)) / growth
    return math.ceil(num_tested / (1 - PATH_SHARE)) + 1


def answer_losses(records: Records, thresholds: Sequence[float]) -> Floats:
    """Return the share of each answer's tokens that are not the full model's, float64 [answers]."""
    _, answer, counts = np.unique(records.answer, return_inverse=True, return_counts=True)
    num_wrong = np.bincount(answer, weights=disagreements(records, thresholds))
    losses: Floats = num_wrong / counts
    return losses


def p_value(losses: Floats, limit: float, seed: int = 0) -> float:
    """Return the p-value of the hypothesis that losses in [0, 1] have a mean of at least `limit`.

    A gambler who bets against it multiplies the capital by 1 + bet * (limit - loss) with each loss;
    when the hypothesis holds, the capital ever exceeds 1 / p with probability p at most (Ville).
    Each bet depends on the losses before it only (aGRAPA of Waudby-Smith and Ramdas, arXiv
    2010.09686).
    """
    shuffled = np.random.default_rng(seed).permutation(losses)
    before = np.arange(1, len(shuffled) + 1)  # one imagined loss comes first: half the limit
    sums = limit / 2 + np.concatenate([[0.0], np.cumsum(shuffled)[:-1]])
    mean = sums / before
    squares = limit * limit / 2 + np.concatenate([[0.0], np.cumsum(shuffled**2)[:-1]])
    variance = np.maximum(squares / before - mean**2, 1e-12)
    bets = np.clip((limit - mean) / (variance + (limit - mean) ** 2), 0, LARGEST_BET / (1 - limit))
    capital = np.cumsum(np.log1p(bets * (limit - shuffled)))
    return float(np.exp(-max(0.0, capital.max())))


def calibrate_exit(
    fit_confidence: Floats, fit_agrees: Bools, confidence: Floats, agrees: Bools
) -> ExitCalibration:
    """Fit the scaling on some records of an exit and measure it on others."""
    slope, intercept = fit_platt(fit_confidence, fit_agrees)
    scaled = scale_confidence(confidence, slope, intercept)
    return ExitCalibration(
        agreement=round(float(agrees.mean()), 4),
        ece=round(expected_calibration_error(confidence, agrees), 4),
        scaled_ece=round(expected_calibration_error(scaled, agrees), 4),
        slope=round(slope, 4),
        intercept=round(intercept, 4),
    )


def logit(confidence: Floats) -> Floats:
    """Return log(p / (1 - p)), kept finite."""
    clipped = np.clip(confidence, 1e-6, 1 - 1e-6)
    odds: Floats = np.log(clipped / (1 - clipped))
    return odds


def scale_confidence(confidence: Floats, slope: float, intercept: float) -> Floats:
    """Return sigmoid(slope * logit(confidence) + intercept)."""
    scaled: Floats = 1 / (1 + np.exp(-(slope * logit(confidence) + intercept)))
    return scaled


def fit_platt(confidence: Floats, agrees: Bools, steps: int = 50) -> tuple[float, float]:
    """Return slope and intercept by maximum likelihood (Platt 1999; Newton's method)."""
    x = np.column_stack([logit(confidence), np.ones(len(confidence))])
    weights = np.array([1.0, 0.0])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-x @ weights))
        gradient = x.T @ (agrees - p) - 1e-3 * weights
        curvature = (x * (p * (1 - p))[:, None]).T @ x + 1e-3 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        weights = weights + step * min(1.0, 2.0 / float(np.abs(step).max() + 1e-12))
        if np.abs(step).max() < 1e-8:
            break
    return float(weights[0]), float(weights[1])


def expected_calibration_error(confidence: Floats, agrees: Bools) -> float:
    """Return the mean distance of confidence and agreement over 15 bins of equal size.

    Source: Nixon et al., arXiv 1904.01685.
    """
    order = np.argsort(confidence, kind="stable")
    gaps: list[float] = []
    for rows in np.array_split(order, NUM_BINS):
        if len(rows):
            gap = float(confidence[rows].mean()) - float(agrees[rows].mean())
            gaps.append(len(rows) * abs(gap))
    return sum(gaps) / len(confidence)


def summarize_thresholds(records: Records, thresholds: Sequence[float]) -> dict[str, float]:
    """Return tokens' agreement, an answer's mean agreement, and the offload rate of thresholds."""
    point = evaluate_thresholds(records, thresholds)
    return {
        "agreement": point.agreement,
        "answer_agreement": 1 - float(answer_losses(records, thresholds).mean()),
        "offload_rate": point.offload_rate,
    }
