"""The registry's tables; the roll-ups' are in `rollup_tables`.

Times are seconds since 1970, UTC; what comes from a device is unique to that device.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, TypeAlias

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

Name: TypeAlias = Annotated[str, mapped_column(String(63))]
Label: TypeAlias = Annotated[str, mapped_column(String(200))]
Digest: TypeAlias = Annotated[str, mapped_column(String(64))]
Amount: TypeAlias = Annotated[int, mapped_column(BigInteger)]
Time: TypeAlias = Annotated[float, mapped_column(Double)]
Milliseconds: TypeAlias = Annotated[float, mapped_column(Double)]


class Table(DeclarativeBase):
    """Base of all tables; constraints get names, so that migrations can change them everywhere."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class IdentityRecord(Table):
    """Everyone that was enrolled: `state` of `fleet.registry.identities.states`, and the SHA-256 of the newest certificate's DER.

    One that is pending has no certificate yet: an empty `fingerprint`, and a `not_after` of 0.
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
    """A device, a group of devices, or a tag ``key=value`` of devices, that an app may send prompts to."""

    __tablename__ = "allowed_targets"

    app: Mapped[Name] = mapped_column(
        ForeignKey("identities.name", ondelete="CASCADE"), primary_key=True
    )
    target: Mapped[str] = mapped_column(String(127), primary_key=True)


class TokenRecord(Table):
    """An enrolment token: one use, by the first key that brings the secret; `key_hash` is the SHA-256 of its SPKI."""

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


class CertificateRecord(Table):
    """A certificate of the fleet's authority; `serial` in lower-case hex, `pem` as it was handed out."""

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
    """What a device said last of itself."""

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
    config_error: Mapped[Label] = mapped_column(default="")


class WorkerRecord(Table):
    """What a worker said last of itself."""

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
    """A scope's settings from then on, whole; its `id` is a version. `target` is a device, a group, or "" for all."""

    __tablename__ = "config_changes"
    __table_args__ = (Index(None, "scope", "target"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    scope: Mapped[str] = mapped_column(String(6))
    target: Mapped[Name]
    settings: Mapped[dict[str, Any]] = mapped_column(JSON)
    changed_at: Mapped[Time]


class BundleRecord(Table):
    """A bundle whose files the server hands out."""

    __tablename__ = "bundles"

    bundle_id: Mapped[Name] = mapped_column(primary_key=True)
    model: Mapped[Label]
    num_bytes: Mapped[Amount]
    added_at: Mapped[Time]


class RolloutRecord(Table):
    """A bundle on its way to devices, stage by stage; `state` and `plan` are those of `fleet.registry.rollouts.plan`."""

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
    """A change: who made it, when, and what. Its `id` grows with every change, so that the newest says if any came."""

    __tablename__ = "audit_log"

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[Time]
    actor: Mapped[Label]
    action: Mapped[Name]
    subject: Mapped[Label]
    details: Mapped[dict[str, Any]] = mapped_column(JSON)


class SessionRecord(Table):
    """One session of a device with a worker, known from its generations."""

    __tablename__ = "sessions"
    __table_args__ = (UniqueConstraint("device", "session"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    device: Mapped[Name] = mapped_column(ForeignKey("identities.name"))
    session: Mapped[Name]
    worker: Mapped[Name | None]
    opened_at: Mapped[Time] = mapped_column(index=True)


class GenerationRecord(Table):
    """One answer of a device, or so many as `answers` says.

    It is kept for as long as the configuration says, counted from `recorded_at`. `switches` are the answer's, as
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
    """How many of a generation's tokens came from one source, e.g. ``exit:8`` or ``cloud``."""

    __tablename__ = "token_counts"

    generation_id: Mapped[int] = mapped_column(ForeignKey("generations.id"), primary_key=True)
    source: Mapped[str] = mapped_column(String(20), primary_key=True)
    tokens: Mapped[Amount]
