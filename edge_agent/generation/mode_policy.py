"""Plain functions of the mode `auto`: they choose a mode from measurements and targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from edge_agent.measurements import Snapshot
from fleet.protocol.modes import Mode

MIN_TOKENS: Final = 16  # least number between two mode changes, unless the link goes or comes back
GAIN: Final = 0.2  # share of the time per token that a change for speed alone must save
SLACK: Final = 0.1  # share by which the current mode may miss a target, and a new one must beat it
MIN_WAIT_MS: Final = 250
MAX_ROUND: Final = 16
MIN_JUDGED: Final = 16  # drafts; from then on their acceptance counts, not the exits' confidence


@dataclass(frozen=True)
class Targets:
    """The targets of an answer. None means no target.

    `promised_agreement` is the agreement of collaborative mode that calibration measured for the
    thresholds in use. If it is None, the exits' own confidence is used.
    """

    target_tpot_ms: float | None = None
    min_agreement: float | None = None
    max_offload_rate: float | None = None
    promised_agreement: float | None = None


@dataclass(frozen=True)
class Prediction:
    """The prediction for one mode.

    The fields are the seconds per token, the share of tokens that equal the full model's, and the
    share of tokens from the cloud.
    """

    tpot_s: float
    agreement: float
    offload_rate: float


@dataclass(frozen=True)
class ModeDecision:
    mode: Mode
    reason: str


def predict(m: Snapshot, targets: Targets) -> dict[Mode, Prediction]:
    """Predict each mode from the time s of a step, the time r of a round trip, the share u of
    tokens below their threshold, and the acceptance c.

    c is the share of the device's own tokens that equal the cloud's. It is measured by verify
    requests. Before the cloud has judged `MIN_JUDGED` drafts, c is the exits' mean confidence.

    - standalone: s per token; agreement c.
    - collaborative: s + u r per token, less two savings for correct drafts: the next step overlaps
      with the round trip, and about every second draft shares its round trip with the next one.
      Agreement 1 - (1 - u)(1 - c above the threshold), or the promised one if that is higher.
    - verified: a round of k drafts takes k s + r and gives 1 + c + ... + c^(k-1) tokens, for the
      best k; agreement 1. The cloud corrects the share 1 - c of the tokens.
    """
    s = m.step_s
    r = m.round_trip_s
    u = m.below_threshold
    c = m.acceptance if m.num_judged >= MIN_JUDGED else m.confidence
    request_s = (1 - m.guess_acceptance / 2) * r - m.guess_acceptance * min(s, r)
    own_agreement = 1 - (1 - u) * (1 - m.emitted_confidence)
    agreement = max(own_agreement, targets.promised_agreement or 0.0)
    rounds = []
    for k in range(1, MAX_ROUND + 1):
        num_tokens = sum(c**i for i in range(k))
        rounds.append((num_tokens, k * s + r))
    tokens, seconds = max(rounds, key=lambda round_: round_[0] / max(round_[1], 1e-9))
    return {
        Mode.STANDALONE: Prediction(s, c, 0.0),
        Mode.COLLABORATIVE: Prediction(s + u * request_s, agreement, u),
        Mode.VERIFIED: Prediction(seconds / tokens, 1.0, 1 - c),
    }


def decide_mode(
    m: Snapshot, targets: Targets, current: Mode, tokens_since_switch: int, *, is_link_up: bool
) -> ModeDecision:
    """Return the mode of the next token, and the reason.

    Without the link the device generates alone, unless the text must be exact (`min_agreement` 1).
    With the link, agreement comes first: a mode that misses this target loses against a mode that
    meets it. The time per token comes second, and the offload rate third. Among modes that miss the
    same targets, the fastest wins, or the one with the highest agreement if `target_tpot_ms` is
    met.
    """
    if not is_link_up:
        if targets.min_agreement == 1.0:
            return ModeDecision(Mode.VERIFIED, "the link is down, and the text must be the cloud's")
        return ModeDecision(Mode.STANDALONE, "the link is down")
    if m.num_round_trips == 0 or m.num_choices == 0:
        return ModeDecision(Mode.COLLABORATIVE, "nothing is measured yet")
    predictions = predict(m, targets)
    ranks = {
        mode: _rank(prediction, targets, is_current=mode is current)
        for mode, prediction in predictions.items()
    }
    best = min(predictions, key=lambda mode: ranks[mode])
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
    """Return whether agreement, time per token and offload rate miss their targets.

    The current mode may miss a target by `SLACK`, so that the mode does not change back and forth.
    """
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
    """Return the milliseconds to wait for an optional verify request: twice the timeout that TCP
    would use (RFC 6298), and at most `base_ms`.

    As in TCP, each loss doubles the wait until there is a verdict. Otherwise a link that has become
    slower than the wait would never be measured.
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
    """Return whether `then` is worth a change of mode, if both miss the same targets."""
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
    now_ms = now.tpot_s * 1000
    then_ms = then.tpot_s * 1000
    speed = f"{then_ms:.0f} ms a token predicted, {current} {now_ms:.0f}"
    if misses[0]:
        return f"{current} has agreement {now.agreement:.3f}, target {targets.min_agreement:g}"
    if misses[1]:
        return f"{speed}, target {targets.target_tpot_ms:g}"
    if misses[2]:
        return (
            f"{current} needs the cloud for {now.offload_rate:.0%} of tokens, "
            f"target at most {targets.max_offload_rate:.0%}"
        )
    if targets.target_tpot_ms is not None:
        return f"{speed}, within {targets.target_tpot_ms:g}"
    return speed
