"""Rows that the registry returns: frozen, ready for a table or for JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct

from fleet.protocol.counts import GenerationCounts
from fleet.protocol.report import ConfigProblem


class DeviceRow(Struct, frozen=True, kw_only=True):
    """An enrolled device and its newest status.

    Times are in seconds since 1970, None for a device that has never published a status. `state` is
    its `IdentityState` now.
    """

    device: str
    group: str | None
    online: bool
    mode: str
    bundle_id: str
    bundle_name: str | None = None
    version: str
    last_seen: float | None
    not_after: float
    config_version: int
    config_error: ConfigProblem | None
    software_error: ConfigProblem | None
    event_error: ConfigProblem | None
    state: str
    tags: dict[str, str]


class WorkerRow(Struct, frozen=True, kw_only=True):
    """The newest status of a worker; `last_seen` in seconds since 1970."""

    worker: str
    online: bool
    draining: bool
    bundle_ids: tuple[str, ...]
    num_sessions: int
    version: str
    last_seen: float


class IdentityRow(Struct, frozen=True, kw_only=True):
    """An enrolled identity; `state` is its `IdentityState` now.

    `targets` are the devices, groups and tags that an app was allowed; `tags` are a device's.
    """

    name: str
    role: str
    group: str | None
    targets: tuple[str, ...]
    fingerprint: str
    created_at: float
    not_after: float
    state: str
    tags: dict[str, str]


class IssuedCertificate(Struct, frozen=True, kw_only=True):
    """A certificate as the registry stores it; times in seconds since 1970.

    In hex: `serial`, the SHA-256 of its DER (`fingerprint`), and that of its key's SPKI
    (`key_hash`).
    """

    serial: str
    fingerprint: str
    key_hash: str
    pem: str
    not_before: float
    not_after: float


class Certified(Struct, frozen=True):
    """The result of joining or renewing: a name, its role, and its certificate in PEM."""

    name: str
    role: str
    pem: str


@dataclass(frozen=True)
class NewToken:
    """A new enrolment token, which is shown once: `secret` is not stored.

    `expires_at` is in seconds since 1970.
    """

    name: str
    id: str
    secret: str = field(repr=False)
    expires_at: float


class TokenRow(Struct, frozen=True, kw_only=True):
    """An enrolment token that can be used; times in seconds since 1970."""

    id: str
    name: str
    role: str
    created_at: float
    expires_at: float


class ApiKeyRow(Struct, frozen=True, kw_only=True):
    """An app's key for the HTTP API.

    `state` is "active", "revoked", "expired", or the `IdentityState` of an app that may not use it.
    Times are in seconds since 1970; a key without `expires_at` is valid until it is revoked.
    """

    id: str
    app: str
    state: str
    created_at: float
    expires_at: float | None


class StoredKey(Struct, frozen=True):
    """A key that is not revoked: its app, the SHA-256 of its secret, and the end of its time."""

    app: str
    secret_hash: str
    expires_at: float | None


class OperatorRow(Struct, frozen=True, kw_only=True):
    """An operator; `role` is an `OperatorRole`.

    `last_seen` is the newest use of a session that is open, in seconds since 1970.
    """

    name: str
    role: str
    created_at: float
    num_sessions: int
    num_keys: int
    last_seen: float | None


class OperatorKeyRow(Struct, frozen=True, kw_only=True):
    """An operator's key; a key without `expires_at` is valid until it is revoked.

    Times are in seconds since 1970.
    """

    id: str
    operator: str
    state: str
    created_at: float
    expires_at: float | None


class DeviceLabels(Struct, frozen=True):
    """The group of a device, and its tags in the form ``key=value``."""

    group: str | None
    tags: tuple[str, ...]


class ApiRights(Struct, frozen=True, kw_only=True):
    """The keys of the HTTP API by their ids, and the devices that their apps may prompt.

    `change` is the newest change of the registry when the rights were read. `devices` are the
    active ones by name.
    """

    change: int = 0
    keys: dict[str, StoredKey] = {}
    devices_of: dict[str, tuple[str, ...]] = {}
    devices: dict[str, DeviceLabels] = {}


class StatsCounts(GenerationCounts, frozen=True, kw_only=True):
    """The sums over answers, and what follows from them.

    `sources` and `shares` are in the order of depth: exits, lookup, cloud, fallback. Quantiles are
    in ms, read from histograms, and None without answers. `switches` counts changes of mode by the
    new mode and the kind of reason. `trend` is the offload rate of equal spans of the window,
    oldest first, and None for a span without tokens.
    """

    generations: int
    errors: int
    shares: dict[str, float]
    offload_rate: float
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    tpot_p50_ms: float | None
    tpot_p95_ms: float | None
    switches: dict[str, int]
    trend: tuple[float | None, ...]


class StatsRow(StatsCounts, frozen=True, kw_only=True):
    """A device's counts.

    `last_seen` is in seconds since 1970, None for a device that has never published a status.
    """

    device: str
    group: str | None
    online: bool
    last_seen: float | None


class GroupStats(StatsCounts, frozen=True, kw_only=True):
    """The counts of the devices that are in a group now; None is for devices without a group."""

    group: str | None


class BundleStats(StatsCounts, frozen=True, kw_only=True):
    """The counts of a bundle over all devices."""

    bundle_id: str
    bundle_name: str | None = None


class HourStats(StatsCounts, frozen=True, kw_only=True):
    """The counts of the answers that began in one hour; `hour_at` is in seconds since 1970."""

    hour_at: float


class SessionRow(Struct, frozen=True, kw_only=True):
    """A session of a device with a worker, and the sums of its generations."""

    session: str
    device: str
    worker: str | None
    opened_at: float
    generations: int
    tokens: int
    bytes_up: int
    bytes_down: int


class RevokedCertificate(Struct, frozen=True):
    """A certificate that may not be used; `serial` in hex.

    With `revoked_at` None it is on hold, and may become valid again.
    """

    serial: str
    name: str
    revoked_at: float | None


class AuditRow(Struct, frozen=True, kw_only=True):
    """A change: its time (seconds since 1970), actor, action, and subject."""

    at: float
    actor: str
    action: str
    subject: str
    details: dict[str, Any]


class BundleRow(Struct, frozen=True, kw_only=True):
    """A bundle whose files the server offers.

    `devices` is the number of online devices that serve it, `wanted` the number whose desired
    settings name it; `workers` serve it. `rollout` is its open roll-out.
    """

    bundle_id: str
    name: str | None
    model: str
    num_bytes: int
    added_at: float
    devices: int
    wanted: int
    workers: tuple[str, ...]
    rollout: int | None
    rollout_state: str


class RolloutRow(Struct, frozen=True, kw_only=True):
    """A roll-out: `stage` counts from 1, with 0 before the first.

    `devices` is the number of its `num_told` devices by `DeviceOutcome`. `answers` and `findings`
    are those of the stage; `doing` is the condition that it waits for, and `reason` is that of its
    last change. Times are in seconds since 1970.
    """

    id: int
    bundle_id: str
    bundle_name: str | None = None
    group: str | None
    state: str
    stage: int
    num_stages: int
    num_targets: int
    num_told: int
    devices: dict[str, int]
    answers: int
    findings: tuple[str, ...]
    doing: str
    reason: str
    started_at: float
    stage_at: float
    ended_at: float | None
    plan: dict[str, Any]


def bundle_label(bundle_id: str, name: str | None) -> str:
    """Return a bundle's id, with its name if it has one."""
    return f"{bundle_id} ({name})" if name else bundle_id
