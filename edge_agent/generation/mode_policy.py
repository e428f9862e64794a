"""Auto mode: from what was measured and what is wanted to a mode, as plain functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from edge_agent.measurements import Snapshot
from fleet.protocol.modes import Mode

MIN_TOKENS: Final = 16  # between two switches, unless the link went or came
GAIN: Final = 0.2  # a switch for speed alone must promise so much less time a token
SLACK: Final = 0.1  # the present mode may miss a target by so much, another must keep it by so much
MIN_WAIT_MS: Final = 250
MAX_ROUND: Final = 16
MIN_JUDGED: Final = (
    16  # drafts; from then on their acceptance is believed instead of the exits' confidence
)


@dataclass(frozen=True)
class Targets:
    """What an answer should keep; None is anything.

    `promised_agreement` is what calibration promises of collaborative mode with the thresholds in use; without such a
    promise the exits' own confidence is believed.
    """

    target_tpot_ms: float | None = None
    min_agreement: float | None = None
    max_offload_rate: float | None = None
    promised_agreement: float | None = None


@dataclass(frozen=True)
class Prediction:
    """Of one mode: seconds a token, share of tokens equal to the full model's, share of tokens from the cloud."""

    tpot_s: float
    agreement: float
    offload_rate: float


@dataclass(frozen=True)
class ModeDecision:
    mode: Mode
    reason: str


def predict(m: Snapshot, targets: Targets) -> dict[Mode, Prediction]:
    """What each mode would do now, with step s, round trip r, share of unsure tokens u, and c, the share of the
    device's own tokens that are the cloud's: as verifies found it, before that the exits' mean confidence.

    standalone: s a token; agreement c. collaborative: s + u r, where behind a draft that is right the next step goes on
    meanwhile, and about every second one shares its round trip with the next; agreement 1 - (1 - u)(1 - c where sure),
    or what is promised. verified: a round of k drafts takes k s + r and gives 1 + c + ... + c^(k-1) tokens, at the best
    k; agreement 1; the cloud corrects 1 - c of the tokens.
    """
    s = m.step_s
    r = m.round_trip_s
    u = m.unsure
    c = m.acceptance if m.num_judged >= MIN_JUDGED else m.confidence
    asked_s = (1 - m.right / 2) * r - m.right * min(s, r)
    agreement = max(1 - (1 - u) * (1 - m.sure_confidence), targets.promised_agreement or 0.0)
    rounds = [(sum(c**i for i in range(k)), k * s + r) for k in range(1, MAX_ROUND + 1)]
    tokens, seconds = max(rounds, key=lambda round_: round_[0] / max(round_[1], 1e-9))
    return {
        Mode.STANDALONE: Prediction(s, c, 0.0),
        Mode.COLLABORATIVE: Prediction(s + u * asked_s, agreement, u),
        Mode.VERIFIED: Prediction(seconds / tokens, 1.0, 1 - c),
    }


def decide(
    m: Snapshot, targets: Targets, current: Mode, tokens_since_switch: int, *, is_link_up: bool
) -> ModeDecision:
    """The mode of the next token, and why.

    Without the link a device is alone, unless only the exact text will do (`min_agreement` 1). Otherwise the mode that
    misses the fewest targets wins, agreement before time before offload; among equals the fastest, or with a
    `target_tpot_ms` that is kept, the one which agrees most.
    """
    if not is_link_up:
        if targets.min_agreement == 1.0:
            return ModeDecision(
                Mode.VERIFIED, "the link is down, and only the cloud's own text will do"
            )
        return ModeDecision(Mode.STANDALONE, "the link is down")
    if m.num_round_trips == 0 or m.num_choices == 0:
        return ModeDecision(Mode.COLLABORATIVE, "nothing is measured yet")
    predictions = predict(m, targets)
    best = min(
        predictions, key=lambda mode: _rank(predictions[mode], targets, is_current=mode is current)
    )
    now = predictions[current]
    then = predictions[best]
    missed_now = missed(now, targets, is_current=True)
    if best is current or tokens_since_switch < MIN_TOKENS:
        return ModeDecision(current, "as before")
    if missed_now <= missed(then, targets) and not _is_better(then, now, targets):
        return ModeDecision(current, "as before")
    return ModeDecision(best, _why(predictions, best, current, missed_now, targets))


def missed(
    prediction: Prediction, targets: Targets, *, is_current: bool = False
) -> tuple[bool, bool, bool]:
    """Whether agreement, time a token and offload rate miss their targets; the present mode has a little credit."""
    slack = SLACK if is_current else -SLACK
    agreement = targets.min_agreement
    tpot_ms = targets.target_tpot_ms
    offload = targets.max_offload_rate
    tolerance = SLACK * (1 - agreement) if agreement is not None and is_current else 0.0
    return (
        agreement is not None and prediction.agreement < agreement - tolerance,
        tpot_ms is not None and prediction.tpot_s * 1000 > tpot_ms * (1 + slack),
        offload is not None and prediction.offload_rate > offload * (1 + slack),
    )


def wait_ms(m: Snapshot, base_ms: int) -> int:
    """How long an assist is worth waiting for: twice what TCP would wait, at most `base_ms`.

    As in TCP (RFC 6298) each loss doubles it until something is answered: a link that has become slower than the wait
    would never be measured otherwise.
    """
    if m.num_round_trips == 0:
        return base_ms
    patient_ms = max(MIN_WAIT_MS, 2000 * (m.round_trip_s + 4 * m.round_trip_spread_s))
    return round(min(base_ms, patient_ms * (1 << min(m.num_losses, 16))))


def _rank(
    prediction: Prediction, targets: Targets, *, is_current: bool
) -> tuple[tuple[bool, bool, bool], float]:
    misses = missed(prediction, targets, is_current=is_current)
    by_agreement = targets.target_tpot_ms is not None and not misses[1]
    return misses, -prediction.agreement if by_agreement else prediction.tpot_s


def _is_better(then: Prediction, now: Prediction, targets: Targets) -> bool:
    """Whether one that misses nothing else is worth a switch."""
    if targets.target_tpot_ms is not None and not missed(then, targets)[1]:
        return then.agreement > now.agreement + 0.01
    return then.tpot_s < (1 - GAIN) * now.tpot_s


def _why(
    predictions: Mapping[Mode, Prediction],
    best: Mode,
    current: Mode,
    misses: tuple[bool, bool, bool],
    targets: Targets,
) -> str:
    now = predictions[current]
    then = predictions[best]
    speed = f"{then.tpot_s * 1000:.0f} ms a token predicted, {current} {now.tpot_s * 1000:.0f}"
    if misses[0]:
        return f"{current} agrees on {now.agreement:.3f}, wanted {targets.min_agreement:g}"
    if misses[1]:
        return f"{speed}, wanted {targets.target_tpot_ms:g}"
    if misses[2]:
        return f"{current} asks for {now.offload_rate:.0%}, wanted at most {targets.max_offload_rate:.0%}"
    if targets.target_tpot_ms is not None:
        return f"{speed}, within {targets.target_tpot_ms:g}"
    return speed
