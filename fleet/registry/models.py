"""The registry's tables; those of the roll-ups are in `fleet.registry.stats.rollup_tables`.

Times are in seconds since 1970, UTC. Ids that a device assigns are unique to that device.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, TypeAlias

import msgspec
from sqlalchemy import (
    JSON,
    BigInteger,
    Double,
    ForeignKey,
    Index,
    MetaData,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fleet.protocol.report import ConfigProblem

Name: TypeAlias = Annotated[str, mapped_column(String(63))]
Label: TypeAlias = Annotated[str, mapped_column(String(200))]
Digest: TypeAlias = Annotated[str, mapped_column(String(64))]
Amount: TypeAlias = Annotated[int, mapped_column(BigInteger)]
Time: TypeAlias = Annotated[float, mapped_column(Double)]
Milliseconds: TypeAlias = Annotated[float, mapped_column(Double)]


class Table(DeclarativeBase):
    """The base of all tables; constraints have names, so that migrations can change them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class IdentityRecord(Table):
    """An enrolled identity: its stored `IdentityState`, and the SHA-256 of its newest certificate.

    The hash is of the certificate's DER. A pending identity has no certificate yet: an empty
    `fingerprint`, and a `not_after` of 0.
    """

    __tablename__ = "identities"

    name: Mapped[Name] = mapped_column(primary_key=True)
    role: Mapped[Name]
    group: Mapped[Name | None]
    fingerprint: Mapped[Digest]
    created_at: Mapped[Time]
    not_after: Mapped[Time]
    state: Mapped[Name]


class TagRecord(Table):
    """A device's tag."""

    __tablename__ = "tags"

    device: Mapped[Name] = mapped_column(
        ForeignKey("identities.name", ondelete="CASCADE"), primary_key=True
    )
    key: Mapped[Name] = mapped_column(primary_key=True)
    value: Mapped[Name]


class AllowedTarget(Table):
    """A device, a group, or a tag ``key=value`` of devices that an app may prompt."""

    __tablename__ = "allowed_targets"

    app: Mapped[Name] = mapped_column(
        ForeignKey("identities.name", ondelete="CASCADE"), primary_key=True
    )
    target: Mapped[str] = mapped_column(String(127), primary_key=True)


class TokenRecord(Table):
    """An enrolment token, for one use by the first key that presents its secret.

    `key_hash` is the SHA-256 of that key's SPKI.
    """

    __tablename__ = "tokens"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    name: Mapped[Name] = mapped_column(
        ForeignKey("identities.name", ondelete="CASCADE"), index=True
    )
    secret_hash: Mapped[Digest]
    created_at: Mapped[Time]
    expires_at: Mapped[Time]
    used_at: Mapped[Time | None]
    key_hash: Mapped[Digest | None]


class ApiKeyRecord(Table):
    """A key of an app for the HTTP API; `secret_hash` is the SHA-256 of its secret."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    app: Mapped[Name] = mapped_column(ForeignKey("identities.name", ondelete="CASCADE"), index=True)
    secret_hash: Mapped[Digest]
    created_at: Mapped[Time]
    expires_at: Mapped[Time | None]
    revoked_at: Mapped[Time | None]


class OperatorRecord(Table):
    """A person who uses the console or the API of operators; `role` is an `OperatorRole`."""

    __tablename__ = "operators"

    name: Mapped[Name] = mapped_column(primary_key=True)
    role: Mapped[Name]
    created_at: Mapped[Time]


class OperatorSecretRecord(Table):
    """A secret that stands for an operator: a link, a browser's session or a key.

    `kind` is an `OperatorSecretKind`; `secret_hash` is the SHA-256 of the secret. A link that was
    used stays until its end, with `used_at`, which for a session is the time of a late request.
    """

    __tablename__ = "operator_secrets"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    operator: Mapped[Name] = mapped_column(
        ForeignKey("operators.name", ondelete="CASCADE"), index=True
    )
    kind: Mapped[Name]
    secret_hash: Mapped[Digest]
    created_at: Mapped[Time]
    expires_at: Mapped[Time | None]
    used_at: Mapped[Time | None]


class CertificateRecord(Table):
    """A certificate of the fleet's authority; `serial` in lower-case hex, `pem` as issued."""

    __tablename__ = "certificates"

    serial: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[Name] = mapped_column(
        ForeignKey("identities.name", ondelete="CASCADE"), index=True
    )
    fingerprint: Mapped[Digest] = mapped_column(unique=True)
    key_hash: Mapped[Digest]
    pem: Mapped[str] = mapped_column(Text)
    not_before: Mapped[Time]
    not_after: Mapped[Time]
    revoked_at: Mapped[Time | None]


class StatusRecord(Table):
    """The newest status of a device; each error is a `ConfigProblem` in builtins."""

    __tablename__ = "device_status"

    device: Mapped[Name] = mapped_column(
        ForeignKey("identities.name", ondelete="CASCADE"), primary_key=True
    )
    online: Mapped[bool]
    epoch: Mapped[Amount]
    bundle_id: Mapped[Label]
    version: Mapped[Label]
    mode: Mapped[Label]
    last_seen: Mapped[Time]
    config_version: Mapped[Amount] = mapped_column(default=0)
    config_error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    software_error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    event_error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))

    @property
    def config_problem(self) -> ConfigProblem | None:
        """The reason why the device does not follow its desired configuration."""
        return msgspec.convert(self.config_error, ConfigProblem | None)

    @property
    def software_problem(self) -> ConfigProblem | None:
        """The reason why the device does not run the desired version of its software."""
        return msgspec.convert(self.software_error, ConfigProblem | None)

    @property
    def event_problem(self) -> ConfigProblem | None:
        """The reason why the device dropped an event."""
        return msgspec.convert(self.event_error, ConfigProblem | None)


class WorkerRecord(Table):
    """The newest status of a worker."""

    __tablename__ = "workers"

    worker: Mapped[Name] = mapped_column(
        ForeignKey("identities.name", ondelete="CASCADE"), primary_key=True
    )
    online: Mapped[bool]
    epoch: Mapped[Amount]
    bundle_ids: Mapped[list[str]] = mapped_column(JSON)
    version: Mapped[Label]
    num_sessions: Mapped[Amount]
    draining: Mapped[bool]
    last_seen: Mapped[Time]


class ConfigChange(Table):
    """All settings of a target from `changed_at` on; `id` is their version.

    `target` is a device, a group, or "" for all.
    """

    __tablename__ = "config_changes"
    __table_args__ = (Index(None, "scope", "target"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    scope: Mapped[str] = mapped_column(String(6))
    target: Mapped[Name]
    settings: Mapped[dict[str, Any]] = mapped_column(JSON)
    changed_at: Mapped[Time]


class BundleRecord(Table):
    """A bundle whose files the server offers, or has offered until `removed_at`.

    `name` is the operator's name for it, which is unique. Reports and roll-outs of the past refer
    to bundles that were removed.
    """

    __tablename__ = "bundles"

    bundle_id: Mapped[Name] = mapped_column(primary_key=True)
    model: Mapped[Label]
    num_bytes: Mapped[Amount]
    added_at: Mapped[Time]
    name: Mapped[Name | None] = mapped_column(unique=True, index=True)
    removed_at: Mapped[Time | None]


class RolloutRecord(Table):
    """A roll-out of a bundle to devices, in stages.

    `state` is a `RolloutState`, and `plan` a `RolloutProgress` in builtins.
    """

    __tablename__ = "rollouts"

    id: Mapped[int] = mapped_column(primary_key=True)
    bundle_id: Mapped[Name] = mapped_column(ForeignKey("bundles.bundle_id"))
    state: Mapped[Name]
    stage: Mapped[int]
    plan: Mapped[dict[str, Any]] = mapped_column(JSON)
    reason: Mapped[Label]
    started_at: Mapped[Time]
    stage_at: Mapped[Time]
    ended_at: Mapped[Time | None]


class AuditRecord(Table):
    """A change, with its actor and its time. `id` grows with every change."""

    __tablename__ = "audit_log"

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[Time]
    actor: Mapped[Label]
    action: Mapped[Name]
    subject: Mapped[Label]
    details: Mapped[dict[str, Any]] = mapped_column(JSON)


class AlarmRuleRecord(Table):
    """The rule of a kind of alarms for one target, as `fleet.registry.alarms.rules` merges it.

    None leaves a value to the next wider scope. `target` is a device, a group, or "" for all.
    """

    __tablename__ = "alarm_rules"

    kind: Mapped[Name] = mapped_column(primary_key=True)
    scope: Mapped[str] = mapped_column(String(6), primary_key=True)
    target: Mapped[Name] = mapped_column(primary_key=True)
    enabled: Mapped[bool | None]
    threshold: Mapped[float | None] = mapped_column(Double)
    for_s: Mapped[float | None] = mapped_column(Double)
    muted_until: Mapped[Time | None]


class AlarmRecord(Table):
    """The newest alarm of a kind about a subject; a later one replaces it under a higher `id`.

    `state` is an `AlarmState`. `is_announced` means that an event told that it fires, which does
    not happen before `muted_until`.
    """

    __tablename__ = "alarms"
    __table_args__ = (UniqueConstraint("kind", "subject"), {"sqlite_autoincrement": True})

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[Name]
    subject: Mapped[Label]
    state: Mapped[Name]
    summary: Mapped[str] = mapped_column(Text)
    value: Mapped[float | None] = mapped_column(Double)
    threshold: Mapped[float | None] = mapped_column(Double)
    fired_at: Mapped[Time]
    resolved_at: Mapped[Time | None]
    muted_until: Mapped[Time | None]
    is_announced: Mapped[bool]
    acknowledged_by: Mapped[Label | None]
    acknowledged_at: Mapped[Time | None]
    note: Mapped[str] = mapped_column(Text)


class AlarmEventRecord(Table):
    """A change of an alarm: the history, and the outbox of deliveries. `id` is never used again.

    `state` is an `AlarmChange`, `alarm` the id of the alarm, `by` the actor.
    """

    __tablename__ = "alarm_events"
    __table_args__ = {"sqlite_autoincrement": True}

    id: Mapped[int] = mapped_column(primary_key=True)
    alarm: Mapped[Amount]
    kind: Mapped[Name]
    subject: Mapped[Label] = mapped_column(index=True)
    state: Mapped[Name]
    summary: Mapped[str] = mapped_column(Text)
    value: Mapped[float | None] = mapped_column(Double)
    threshold: Mapped[float | None] = mapped_column(Double)
    at: Mapped[Time] = mapped_column(index=True)
    by: Mapped[Label]
    note: Mapped[str] = mapped_column(Text)


class AlarmCursorRecord(Table):
    """The newest event of alarms that was delivered to a target, or given up."""

    __tablename__ = "alarm_cursors"

    target: Mapped[Label] = mapped_column(primary_key=True)
    event_id: Mapped[Amount]


class SessionRecord(Table):
    """One session of a device with a worker, as its generations report it."""

    __tablename__ = "sessions"
    __table_args__ = (UniqueConstraint("device", "session"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    device: Mapped[Name] = mapped_column(ForeignKey("identities.name"))
    session: Mapped[Name]
    worker: Mapped[Name | None]
    opened_at: Mapped[Time] = mapped_column(index=True)


class GenerationRecord(Table):
    """One reported generation of a device, or the sum of `answers` of them.

    It is kept for the configured number of days from `recorded_at` on. `switches` are
    `fleet.protocol.report.Switch` in builtins.
    """

    __tablename__ = "generations"
    __table_args__ = (UniqueConstraint("device", "generation"), Index(None, "device", "started_at"))

    id: Mapped[int] = mapped_column(primary_key=True)
    device: Mapped[Name] = mapped_column(ForeignKey("identities.name"))
    generation: Mapped[Name]
    app: Mapped[Name]
    request: Mapped[Name]
    mode: Mapped[Label]
    bundle_id: Mapped[Name]
    started_at: Mapped[Time]
    prompt_tokens: Mapped[Amount]
    tokens: Mapped[Amount]
    assists: Mapped[Amount]
    bytes_up: Mapped[Amount]
    bytes_down: Mapped[Amount]
    ttft_ms: Mapped[Milliseconds]
    tpot_ms: Mapped[Milliseconds]
    finish_reason: Mapped[Label]
    worker: Mapped[Name | None]
    session_id: Mapped[int | None] = mapped_column(ForeignKey("sessions.id"), index=True)
    verifies: Mapped[Amount] = mapped_column(default=0)
    drafted: Mapped[Amount] = mapped_column(default=0)
    switches: Mapped[list[dict[str, Any]]] = mapped_column(JSON, default=list)
    recorded_at: Mapped[Time] = mapped_column(default=time.time, index=True)
    answers: Mapped[Amount] = mapped_column(default=1)
    judged: Mapped[Amount] = mapped_column(default=0)
    agreed: Mapped[Amount] = mapped_column(default=0)


class TokenCount(Table):
    """The number of a generation's tokens from one source, e.g. ``exit:8`` or ``cloud``."""

    __tablename__ = "token_counts"

    generation_id: Mapped[int] = mapped_column(ForeignKey("generations.id"), primary_key=True)
    source: Mapped[str] = mapped_column(String(20), primary_key=True)
    tokens: Mapped[Amount]
