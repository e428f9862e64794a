"""The kinds of alarms, their states, and the changes that are events."""

from __future__ import annotations

from enum import StrEnum


class AlarmKind(StrEnum):
    """The condition that an alarm is about.

    The subject is a device; of `certificate` any identity; of `rollout` ``rollout:ID``; of `worker`
    ``bundle:ID`` for a bundle without a worker, or a worker with too many sessions.

    `offload`: share of tokens from the cloud. `fallback`: share of tokens that a device gave alone
    because the cloud or the link failed. `errors`: share of answers that failed. `agreement`: the
    promise of the thresholds is broken. `offline`: no connection. `certificate`: its end is near.
    `config`: the desired settings are refused or not followed. `rollout`: a roll-out was stopped.
    """

    OFFLOAD = "offload"
    FALLBACK = "fallback"
    ERRORS = "errors"
    AGREEMENT = "agreement"
    OFFLINE = "offline"
    CERTIFICATE = "certificate"
    CONFIG = "config"
    ROLLOUT = "rollout"
    WORKER = "worker"


class AlarmState(StrEnum):
    """The state of an alarm."""

    FIRING = "firing"
    RESOLVED = "resolved"


class AlarmChange(StrEnum):
    """A change of an alarm, which is an event."""

    FIRING = "firing"
    RESOLVED = "resolved"
    ACKNOWLEDGED = "acknowledged"
