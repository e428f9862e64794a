"""What the registry answers: frozen rows, ready for a table or for JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct


class DeviceRow(Struct, frozen=True, kw_only=True):
    """An enrolled device and what it said last; times in seconds since 1970, None when it never came.

    `state` is one of `fleet.registry.identities.states`, now.
    """

    device: str
    group: str | None
    online: bool
    mode: str
    bundle_id: str
    version: str
    last_seen: float | None
    not_after: float
    config_version: int
    config_error: str
    state: str
    tags: dict[str, str]


class WorkerRow(Struct, frozen=True, kw_only=True):
    """What a worker said last; `last_seen` in seconds since 1970."""

    worker: str
    online: bool
    draining: bool
    bundle_ids: tuple[str, ...]
    num_sessions: int
    version: str
    last_seen: float


class IdentityRow(Struct, frozen=True, kw_only=True):
    """An enrolled identity; `targets` are the devices and groups that an app was allowed, `tags` a device's.

    `state` is its state now, of `fleet.registry.identities.states`.
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
    """A certificate as the registry keeps it: `serial`, SHA-256 of its DER and of its key's SPKI in hex; PEM; times."""

    serial: str
    fingerprint: str
    key_hash: str
    pem: str
    not_before: float
    not_after: float


class Certified(Struct, frozen=True):
    """What an identity gets when it joins or renews: its name, its role, and its certificate in PEM."""

    name: str
    role: str
    pem: str


@dataclass(frozen=True)
class NewToken:
    """An enrolment token as it is told once: `secret` is nowhere else. `expires_at` in seconds since 1970."""

    name: str
    id: str
    secret: str = field(repr=False)
    expires_at: float


class Counts(Struct, frozen=True, kw_only=True):
    """What answers add up to. `sources` and `shares` are in the order of depth: exits, lookup, cloud, fallback.

    Quantiles are in ms, read from histograms, and None without answers. `switches` counts changes of mode by the new
    mode and the kind of reason. `trend` is the offload rate of equal parts of the window, oldest first, None where
    nothing was generated. Of `judged` tokens that an exit was sure of, the cloud chose the same for `agreed`.
    """

    generations: int
    tokens: int
    sources: dict[str, int]
    shares: dict[str, float]
    offload_rate: float
    bytes_up: int
    bytes_down: int
    prompt_tokens: int
    errors: int
    assists: int
    verifies: int
    drafted: int
    judged: int
    agreed: int
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    tpot_p50_ms: float | None
    tpot_p95_ms: float | None
    switches: dict[str, int]
    trend: tuple[float | None, ...]


class StatsRow(Counts, frozen=True, kw_only=True):
    """A device's counts; `last_seen` in seconds since 1970, None when it never came."""

    device: str
    group: str | None
    online: bool
    last_seen: float | None


class GroupStats(Counts, frozen=True, kw_only=True):
    """The counts of the devices that are in a group now; None are those in none."""

    group: str | None


class BundleStats(Counts, frozen=True, kw_only=True):
    """The counts of a bundle, on whatever device."""

    bundle_id: str


class HourStats(Counts, frozen=True, kw_only=True):
    """The counts of the answers that began in the hour from `hour_at` on, in seconds since 1970."""

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
    """A certificate that may not be used: `serial` in hex; `revoked_at` None is one on hold, which may come back."""

    serial: str
    name: str
    revoked_at: float | None


class AuditRow(Struct, frozen=True, kw_only=True):
    """A change: when (seconds since 1970), who made it, what it was, and of whom or what."""

    at: float
    actor: str
    action: str
    subject: str
    details: dict[str, Any]


class BundleRow(Struct, frozen=True, kw_only=True):
    """A bundle whose files the server hands out.

    `devices` are online and serve it, `wanted` are to serve it by the settings; `workers` serve it. `rollout` is one
    that is open.
    """

    bundle_id: str
    model: str
    num_bytes: int
    added_at: float
    devices: int
    wanted: int
    workers: tuple[str, ...]
    rollout: int | None
    rollout_state: str


class RolloutRow(Struct, frozen=True, kw_only=True):
    """A roll-out: `stage` counts from 1, 0 is none yet; `devices` those that were told, by what has become of them.

    `answers` and `findings` are of this stage, `doing` is what it waits for; `reason` is that of its last change.
    Times are in seconds since 1970.
    """

    id: int
    bundle_id: str
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
