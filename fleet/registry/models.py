"""The registry's tables; the roll-ups' are in `rollup_tables`.

Times are seconds since 1970, UTC; what comes from a device is unique to that device.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, TypeAlias

from sqlalchemy import JSON, BigInteger, Double, ForeignKey, Index, MetaData, String, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Name: TypeAlias = Annotated[str, mapped_column(String(63))]
Label: TypeAlias = Annotated[str, mapped_column(String(200))]
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
    """Everyone that was enrolled, and the SHA-256 of the certificate's DER."""

    __tablename__ = "identities"

    name: Mapped[Name] = mapped_column(primary_key=True)
    role: Mapped[Name]
    group: Mapped[Name | None]
    fingerprint: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[Time]
    not_after: Mapped[Time]
    revoked: Mapped[bool]


class AllowedTarget(Table):
    """A device, or a group of devices, that an app may send prompts to."""

    __tablename__ = "allowed_targets"

    app: Mapped[Name] = mapped_column(ForeignKey("identities.name", ondelete="CASCADE"), primary_key=True)
    target: Mapped[Name] = mapped_column(primary_key=True)


class StatusRecord(Table):
    """What a device said last of itself."""

    __tablename__ = "device_status"

    device: Mapped[Name] = mapped_column(ForeignKey("identities.name", ondelete="CASCADE"), primary_key=True)
    online: Mapped[bool]
    epoch: Mapped[Amount]
    bundle_id: Mapped[Label]
    version: Mapped[Label]
    mode: Mapped[Label]
    last_seen: Mapped[Time]


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
    `fleet.report.Switch` in builtins.
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


class TokenCount(Table):
    """How many of a generation's tokens came from one source, e.g. ``exit:8`` or ``cloud``."""

    __tablename__ = "token_counts"

    generation_id: Mapped[int] = mapped_column(ForeignKey("generations.id"), primary_key=True)
    source: Mapped[str] = mapped_column(String(20), primary_key=True)
    tokens: Mapped[Amount]
