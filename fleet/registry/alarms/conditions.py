"""Conditions of alarms, as plain functions of an observation and the rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Final, NamedTuple, TypeAlias

from msgspec.structs import replace

from fleet.protocol.access import Role
from fleet.protocol.types import DAY_S
from fleet.registry.alarms.alarm_kinds import AlarmKind
from fleet.registry.alarms.observations import (
    FleetObservation,
    ObservedCertificate,
    ObservedCounts,
    ObservedDevice,
)
from fleet.registry.alarms.rules import AlarmRule, AlarmRuleBook
from fleet.registry.alarms.transitions import AlarmCondition
from fleet.registry.rollouts.canary_analysis import INTERIM_Z, ShareSample, wilson
from fleet.registry.targets import Scope, Target
from fleet.utils.printable import count, printable

MIN_TOKENS: Final = 200
MIN_ANSWERS: Final = 10
MIN_JUDGED: Final = 200
"""With fewer tokens or answers in the two hours, no share is known."""

LIFE_SHARE: Final = 1 / 6
"""A certificate is renewed at two thirds of its life: a sixth of it before the end is late."""

MAX_REASON_LENGTH: Final = 200


class BundleFacts(NamedTuple):
    """The facts on a bundle that only its manifest has.

    `promise` is the least agreement that its calibrated thresholds promise, None without one.
    """

    needs_worker: bool = True
    promise: float | None = None


FactsOf: TypeAlias = Callable[[str], BundleFacts]


def find_conditions(
    fleet: FleetObservation, rules: AlarmRuleBook, facts_of: FactsOf, now: float
) -> Iterator[AlarmCondition]:
    """Yield the conditions of enabled rules that hold at `now`."""
    for device in fleet.devices:
        yield from _status_conditions(device, rules)
        if counts := fleet.counts.get(device.name):
            yield from _share_conditions(device, counts, rules)
            yield from _agreement(device, counts, fleet, rules, facts_of)
    for certificate in fleet.certificates:
        yield from _certificate(certificate, rules, now)
    yield from _rollouts(fleet, rules)
    yield from _workers(fleet, rules, facts_of)


def _status_conditions(device: ObservedDevice, rules: AlarmRuleBook) -> Iterator[AlarmCondition]:
    if not device.online:
        rule = rules.rule(AlarmKind.OFFLINE, device.name, device.group)
        text = f"{device.name} is offline, last seen {_utc(device.last_seen)}"
        yield from _condition(AlarmKind.OFFLINE, device.name, text, rule)
    elif reason := _why_not_following(device):
        rule = rules.rule(AlarmKind.CONFIG, device.name, device.group)
        yield from _condition(AlarmKind.CONFIG, device.name, f"{device.name} {reason}", rule)


def _why_not_following(device: ObservedDevice) -> str:
    """Return why an online device does not follow its desired settings; "" if it does."""
    if device.problem is not None:
        return f"refuses its desired settings: {_one_line(device.problem)}"
    if device.config_version != device.wanted_version:
        return (
            f"has version {device.config_version} of its desired settings instead of "
            f"{device.wanted_version}"
        )
    return ""


class _Share(NamedTuple):
    kind: AlarmKind
    part: int
    whole: int
    least: int
    text: str


def _shares(counts: ObservedCounts) -> tuple[_Share, ...]:
    offload = _Share(
        kind=AlarmKind.OFFLOAD,
        part=counts.cloud_tokens,
        whole=counts.tokens,
        least=MIN_TOKENS,
        text="tokens come from the cloud",
    )
    fallback = _Share(
        kind=AlarmKind.FALLBACK,
        part=counts.fallback_tokens,
        whole=counts.joint_tokens,
        least=MIN_TOKENS,
        text="tokens are fallbacks, because the cloud or the link failed",
    )
    errors = _Share(
        kind=AlarmKind.ERRORS,
        part=counts.errors,
        whole=counts.answers,
        least=MIN_ANSWERS,
        text="answers failed",
    )
    return offload, fallback, errors


def _share_conditions(
    device: ObservedDevice, counts: ObservedCounts, rules: AlarmRuleBook
) -> Iterator[AlarmCondition]:
    for share in _shares(counts):
        rule = rules.rule(share.kind, device.name, device.group)
        limit = 1.0 if rule.threshold is None else rule.threshold
        if share.whole >= share.least and share.part > limit * share.whole:
            value = share.part / share.whole
            text = f"{device.name}: {value:.0%} of the {share.text}, limit {limit:.0%}"
            yield from _condition(share.kind, device.name, text, rule, value=value)


def _agreement(
    device: ObservedDevice,
    counts: ObservedCounts,
    fleet: FleetObservation,
    rules: AlarmRuleBook,
    facts_of: FactsOf,
) -> Iterator[AlarmCondition]:
    """Compare the upper bound of the agreement with the promise: below it, chance is ruled out."""
    if counts.judged < MIN_JUDGED:
        return
    rule = rules.rule(AlarmKind.AGREEMENT, device.name, device.group)
    promise = facts_of(device.bundle_id).promise if rule.threshold is None else rule.threshold
    agreement = min(1.0, counts.agreed / counts.judged)
    _, high = wilson(ShareSample(agreement, counts.judged), INTERIM_Z)
    if promise is None or high >= promise:
        return
    if rule.threshold is None and _has_own_thresholds(device, fleet):
        return  # the promise is that of the bundle's thresholds
    text = f"{device.name}: agreement {agreement:.1%}, promised {promise:.1%}"
    rule = replace(rule, threshold=promise)
    yield from _condition(AlarmKind.AGREEMENT, device.name, text, rule, value=agreement)


def _has_own_thresholds(device: ObservedDevice, fleet: FleetObservation) -> bool:
    targets = {Target(Scope.ALL), Target(Scope.DEVICE, device.name)}
    targets.add(Target(Scope.GROUP, device.group or ""))
    return not targets.isdisjoint(fleet.threshold_targets())


def _certificate(
    certificate: ObservedCertificate, rules: AlarmRuleBook, now: float
) -> Iterator[AlarmCondition]:
    device = certificate.name if certificate.role == Role.DEVICE else None
    rule = rules.rule(AlarmKind.CERTIFICATE, device, certificate.group)
    near_s = (rule.threshold or 0.0) * DAY_S
    if certificate.begin is not None:
        near_s = min(near_s, LIFE_SHARE * (certificate.end - certificate.begin))
    left_s = certificate.end - now
    if left_s <= near_s:
        verb = "ends" if left_s > 0 else "ended"
        text = f"the certificate of {certificate.name} {verb} at {_utc(certificate.end)}"
        days = round(left_s / DAY_S, 3)
        yield from _condition(AlarmKind.CERTIFICATE, certificate.name, text, rule, value=days)


def _rollouts(fleet: FleetObservation, rules: AlarmRuleBook) -> Iterator[AlarmCondition]:
    for rollout in fleet.rollouts:
        rule = rules.rule(AlarmKind.ROLLOUT, group=rollout.group)
        text = (
            f"roll-out {rollout.id} of bundle {rollout.bundle_id} was stopped: "
            f"{_one_line(rollout.reason)}"
        )
        yield from _condition(AlarmKind.ROLLOUT, f"rollout:{rollout.id}", text, rule)


def _workers(
    fleet: FleetObservation, rules: AlarmRuleBook, facts_of: FactsOf
) -> Iterator[AlarmCondition]:
    rule = rules.rule(AlarmKind.WORKER)
    for bundle_id in fleet.needed_bundles:
        if bundle_id not in fleet.served_bundles and facts_of(bundle_id).needs_worker:
            text = f"no worker serves bundle {bundle_id}"
            yield from _condition(AlarmKind.WORKER, f"bundle:{bundle_id}", text, rule)
    if rule.threshold is None:
        return
    for worker, sessions in fleet.sessions.items():
        if sessions > rule.threshold:
            text = f"{worker} has {count(sessions, 'session')}, limit {rule.threshold:g}"
            yield from _condition(AlarmKind.WORKER, worker, text, rule, value=float(sessions))


def _condition(
    kind: AlarmKind, subject: str, summary: str, rule: AlarmRule, *, value: float | None = None
) -> Iterator[AlarmCondition]:
    if rule.enabled:
        yield AlarmCondition(
            kind=kind,
            subject=subject,
            summary=summary,
            value=value,
            threshold=rule.threshold,
            for_s=rule.for_s,
            muted_until=rule.muted_until,
        )


def _utc(at: float) -> str:
    """Return a time of this server's clock, or of a certificate, to the minute."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _one_line(text: str) -> str:
    """Return a text of a device, cut, on one line."""
    return printable(" ".join(text.split()))[:MAX_REASON_LENGTH]
