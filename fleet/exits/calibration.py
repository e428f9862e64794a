"""A promise about thresholds that holds on new text, and confidences that mean what they say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np

from fleet.errors import ConfigError
from fleet.exits.records import Bools, Floats, Records
from fleet.exits.thresholds import AGREEMENTS, OFF, Point, emitting, frontier, measure, wrong

METHOD: Final = "learn-then-test, betting"
LARGEST_BET: Final = 0.9
PATH_SHARE: Final = 0.4  # of the answers; they choose what is tested on the others
NUM_BINS: Final = 15


class ExitCalibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Of one exit: agreement, expected calibration error of the raw and of the scaled confidence, and the scaling.

    Scaled: sigmoid(slope * logit(confidence) + intercept). It keeps the order, so thresholds stay in raw confidence.
    """

    agreement: float
    ece: float
    scaled_ece: float
    slope: float
    intercept: float


class CurvePoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Thresholds with what they give: overall agreement, offload rate, and each exit's share of the tokens."""

    thresholds: tuple[float, ...]
    coverage: tuple[float, ...]
    agreement: float
    offload_rate: float


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How thresholds were found: the mean agreement of an answer is at least `target_agreement`, with `confidence`."""

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
    """One threshold for each exit, with the promise that a new answer's expected agreement is at least `target`.

    Learn then Test (Angelopoulos et al., arXiv 2110.01052, as in CALM, arXiv 2207.07061): some answers give a path of
    thresholds from careful to bold; the others test them in that order, until one cannot be shown to keep `target`
    with error probability 1 - `confidence`. The unit is the answer, whose loss is the share of its tokens that are
    not the full model's: the tokens of one answer depend on each other.

    Raises:
        ConfigError: target or confidence outside (0, 1), or too few answers to show anything; says how many it takes.
    """
    for name, value in (("target agreement", target), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ConfigError(f"{name} {value}: expected a number between 0 and 1, e.g. 0.98")
    needed = answers_needed(target, confidence)
    if records.num_answers < needed:
        raise ConfigError(
            f"{records.num_answers} answers are too few to promise agreement {target} with confidence {confidence}: "
            f"at least {needed} are needed; give more prompts, or a lower target or confidence"
        )
    path_part, test_part = records.split(PATH_SHARE, seed)
    levels = sorted(
        {*AGREEMENTS, target, *np.linspace(target - (1 - target) / 2, (1 + target) / 2, 41)},
        reverse=True,
    )
    thresholds: tuple[float, ...] = (OFF,) * len(records.exits)
    for point in frontier(path_part, levels):
        if p_value(answer_losses(test_part, point.thresholds), 1 - target, seed) > 1 - confidence:
            break
        thresholds = point.thresholds
    exits = {
        str(layer): calibrate_exit(
            path_part.confidence[:, i],
            path_part.agrees[:, i],
            test_part.confidence[:, i],
            test_part.agrees[:, i],
        )
        for i, layer in enumerate(records.exits)
    }
    return thresholds, Calibration(
        method=METHOD,
        target_agreement=target,
        confidence=confidence,
        num_answers=records.num_answers,
        num_tokens=len(records),
        prompts_sha256=tuple(prompts_sha256),
        exits=exits,
        curve=tuple(curve_point(records, point) for point in frontier(records)),
    )


def curve_point(records: Records, point: Point) -> CurvePoint:
    """A point with each exit's share of the tokens."""
    source = emitting(records, point.thresholds)
    coverage = tuple(round(float((source == i).mean()), 4) for i in range(len(records.exits)))
    thresholds = tuple(round(threshold, 6) for threshold in point.thresholds)
    return CurvePoint(thresholds, coverage, round(point.agreement, 4), round(point.offload_rate, 4))


def answers_needed(target: float, confidence: float) -> int:
    """The fewest answers with which `target` can be shown at all: none of those tested makes a mistake."""
    tested = math.log(1 / (1 - confidence)) / math.log1p(LARGEST_BET * (1 - target) / target)
    return math.ceil(tested / (1 - PATH_SHARE)) + 1


def answer_losses(records: Records, thresholds: Sequence[float]) -> Floats:
    """By answer: the share of its tokens that are not the full model's, float64 [answers]."""
    _, answer, counts = np.unique(records.answer, return_inverse=True, return_counts=True)
    losses: Floats = np.bincount(answer, weights=wrong(records, thresholds)) / counts
    return losses


def p_value(losses: Floats, limit: float, seed: int = 0) -> float:
    """Of the hypothesis that losses in [0, 1] have a mean of at least `limit`.

    A gambler who bets against it multiplies the capital by 1 + bet * (limit - loss) with each loss; when the
    hypothesis holds, the capital ever exceeds 1 / p with probability p at most (Ville). The bet is fixed before each
    loss is seen, from those before it (aGRAPA of Waudby-Smith and Ramdas, arXiv 2010.09686).
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
    """Fits the scaling on one part of the text and measures on the other."""
    slope, intercept = fit_platt(fit_confidence, fit_agrees)
    return ExitCalibration(
        agreement=round(float(agrees.mean()), 4),
        ece=round(expected_calibration_error(confidence, agrees), 4),
        scaled_ece=round(
            expected_calibration_error(scale(confidence, slope, intercept), agrees), 4
        ),
        slope=round(slope, 4),
        intercept=round(intercept, 4),
    )


def logit(confidence: Floats) -> Floats:
    """log(p / (1 - p)), kept finite."""
    clipped = np.clip(confidence, 1e-6, 1 - 1e-6)
    odds: Floats = np.log(clipped / (1 - clipped))
    return odds


def scale(confidence: Floats, slope: float, intercept: float) -> Floats:
    """sigmoid(slope * logit(confidence) + intercept)."""
    scaled: Floats = 1 / (1 + np.exp(-(slope * logit(confidence) + intercept)))
    return scaled


def fit_platt(confidence: Floats, agrees: Bools, steps: int = 50) -> tuple[float, float]:
    """Slope and intercept by maximum likelihood (Platt 1999, on log-odds), with Newton's method."""
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
    """Mean distance of confidence and agreement over 15 bins of equal size (Nixon et al., arXiv 1904.01685)."""
    order = np.argsort(confidence, kind="stable")
    bins = [part for part in np.array_split(order, NUM_BINS) if len(part)]
    gaps = [
        len(part) * abs(float(confidence[part].mean()) - float(agrees[part].mean()))
        for part in bins
    ]
    return sum(gaps) / len(confidence)


def measured_on(records: Records, thresholds: Sequence[float]) -> dict[str, float]:
    """What thresholds give: tokens' agreement, the mean agreement of an answer, and the offload rate."""
    point = measure(records, thresholds)
    return {
        "agreement": point.agreement,
        "answer_agreement": 1 - float(answer_losses(records, thresholds).mean()),
        "offload_rate": point.offload_rate,
    }
