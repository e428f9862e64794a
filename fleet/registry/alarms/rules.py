"""Rules of alarms: built in, for all, for a group and for a device, merged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple, TypeAlias

from msgspec import Struct
from msgspec.structs import asdict, replace

from fleet.errors import ConfigError
from fleet.protocol.types import DAY_S
from fleet.registry.alarms.alarm_kinds import AlarmKind
from fleet.registry.targets import Scope, Target

MAX_FOR_S: Final = 30.0 * DAY_S
MAX_MUTE_S: Final = 366.0 * DAY_S


class AlarmRuleValues(Struct, frozen=True, kw_only=True):
    """The values that one target sets itself; None leaves a value to the next wider scope."""

    enabled: bool | None = None
    threshold: float | None = None
    for_s: float | None = None
    muted_until: float | None = None


class AlarmRule(Struct, frozen=True, kw_only=True):
    """A merged rule.

    An alarm fires once its condition has held for `for_s` seconds. Until `muted_until` (seconds
    since 1970) it is in the list, and no event tells of it.

    `threshold` is a share for `offload`, `fallback` and `errors`, the least agreement for
    `agreement`, days before the end for `certificate`, and sessions of one worker for `worker`.
    None is the promise of the device's bundle for `agreement`, and no limit for `worker`.
    """

    enabled: bool = True
    threshold: float | None = None
    for_s: float
    muted_until: float = 0.0


class ThresholdRange(NamedTuple):
    """The least and the greatest threshold of a kind, and its meaning in errors and tables."""

    low: float
    high: float
    unit: str


DEFAULT_RULES: Final[dict[AlarmKind, AlarmRule]] = {
    AlarmKind.OFFLOAD: AlarmRule(threshold=0.8, for_s=1800.0),
    AlarmKind.FALLBACK: AlarmRule(threshold=0.2, for_s=600.0),
    AlarmKind.ERRORS: AlarmRule(threshold=0.1, for_s=300.0),
    AlarmKind.AGREEMENT: AlarmRule(for_s=600.0),
    AlarmKind.OFFLINE: AlarmRule(for_s=600.0),
    AlarmKind.CERTIFICATE: AlarmRule(threshold=7.0, for_s=600.0),
    AlarmKind.CONFIG: AlarmRule(for_s=900.0),
    AlarmKind.ROLLOUT: AlarmRule(for_s=0.0),
    AlarmKind.WORKER: AlarmRule(for_s=120.0),
}

THRESHOLDS: Final[dict[AlarmKind, ThresholdRange]] = {
    AlarmKind.OFFLOAD: ThresholdRange(0.0, 1.0, "share of the tokens"),
    AlarmKind.FALLBACK: ThresholdRange(0.0, 1.0, "share of the tokens"),
    AlarmKind.ERRORS: ThresholdRange(0.0, 1.0, "share of the answers"),
    AlarmKind.AGREEMENT: ThresholdRange(0.0, 1.0, "least agreement"),
    AlarmKind.CERTIFICATE: ThresholdRange(0.0, 3650.0, "days before the end"),
    AlarmKind.WORKER: ThresholdRange(1.0, 1e6, "sessions of one worker"),
}
"""The kinds that have a threshold."""

SCOPES: Final[dict[AlarmKind, tuple[Scope, ...]]] = {
    AlarmKind.ROLLOUT: (Scope.ALL, Scope.GROUP),
    AlarmKind.WORKER: (Scope.ALL,),
}
"""The scopes of the kinds that are not about devices alone; every other kind has all scopes."""

RuleKey: TypeAlias = tuple[AlarmKind, Target]


def kinds_of(scope: Scope) -> list[AlarmKind]:
    """Return the kinds that may have a rule of this scope."""
    return [kind for kind in AlarmKind if scope in SCOPES.get(kind, tuple(Scope))]


def check_scope(kind: AlarmKind, target: Target) -> None:
    """Raise ConfigError unless a kind may have a rule for a target."""
    if kind not in kinds_of(target.scope):
        wider = " or ".join(SCOPES[kind])
        raise ConfigError(f"{kind} has no rule for {target}: expected a rule for {wider}")


def check_rule(kind: AlarmKind, values: AlarmRuleValues) -> None:
    """Raise ConfigError unless the values of a target can be stored."""
    if values == AlarmRuleValues():
        raise ConfigError(f"nothing to set for {kind}: give a threshold, a duration, or on or off")
    if values.threshold is not None:
        _check_threshold(kind, values.threshold)
    if values.for_s is not None:
        check_delay(values.for_s)


def check_delay(for_s: float) -> float:
    """Return the seconds for which a condition holds before its alarm fires. Raises ConfigError."""
    if not 0 <= for_s <= MAX_FOR_S:
        raise ConfigError(
            f"for {for_s:g} s: expected 0 to {MAX_FOR_S:g} seconds before an alarm fires"
        )
    return for_s


def _check_threshold(kind: AlarmKind, threshold: float) -> None:
    known = THRESHOLDS.get(kind)
    if known is None:
        having = ", ".join(THRESHOLDS)
        raise ConfigError(f"{kind} has no threshold, got {threshold:g}; these have one: {having}")
    if not known.low <= threshold <= known.high:
        raise ConfigError(
            f"threshold {threshold:g} of {kind}: expected {known.low:g} to {known.high:g} "
            f"({known.unit})"
        )


def merge_rules(kind: AlarmKind, *scopes: AlarmRuleValues | None) -> AlarmRule:
    """Merge the built-in rule with scopes, given from the widest to the narrowest."""
    rule = DEFAULT_RULES[kind]
    for scope in filter(None, scopes):
        given: dict[str, Any] = {
            name: value for name, value in asdict(scope).items() if value is not None
        }
        rule = replace(rule, **given)
    return rule


class AlarmRuleBook:
    """All rules, by kind and target."""

    def __init__(self, own: Mapping[RuleKey, AlarmRuleValues]) -> None:
        self.own = dict(own)
        self._merged: dict[tuple[AlarmKind, str | None, str | None], AlarmRule] = {}

    def rule(
        self, kind: AlarmKind, device: str | None = None, group: str | None = None
    ) -> AlarmRule:
        """Return the merged rule for a device of a group; without both, that for all."""
        if device is not None and (kind, Target(Scope.DEVICE, device)) not in self.own:
            device = None  # it shares the rule of its group
        key = (kind, device, group)
        if key not in self._merged:
            self._merged[key] = merge_rules(kind, *self._scopes(kind, device, group))
        return self._merged[key]

    def greatest_threshold(self, kind: AlarmKind) -> float:
        """Return the greatest threshold of any target for a kind that has one."""
        own = [values.threshold for (each, _), values in self.own.items() if each is kind]
        return max(filter(None, [*own, DEFAULT_RULES[kind].threshold]), default=0.0)

    def _scopes(
        self, kind: AlarmKind, device: str | None, group: str | None
    ) -> list[AlarmRuleValues | None]:
        targets = [Target(Scope.ALL)]
        targets += [Target(Scope.GROUP, group)] if group else []
        targets += [Target(Scope.DEVICE, device)] if device else []
        return [self.own.get((kind, target)) for target in targets]
