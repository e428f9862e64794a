"""Alarms: their rules, their states, and the events that are delivered."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.create_table(
        "alarm_rules",
        sa.Column("kind", sa.String(63), nullable=False),
        sa.Column("scope", sa.String(6), nullable=False),
        sa.Column("target", sa.String(63), nullable=False),
        sa.Column("enabled", sa.Boolean(), nullable=True),
        sa.Column("threshold", sa.Double(), nullable=True),
        sa.Column("for_s", sa.Double(), nullable=True),
        sa.Column("muted_until", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("kind", "scope", "target", name=op.f("pk_alarm_rules")),
    )
    _create_alarms()
    _create_events()
    op.create_table(
        "alarm_cursors",
        sa.Column("target", sa.String(200), nullable=False),
        sa.Column("event_id", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("target", name=op.f("pk_alarm_cursors")),
    )


def _create_alarms() -> None:
    op.create_table(
        "alarms",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(63), nullable=False),
        sa.Column("subject", sa.String(200), nullable=False),
        sa.Column("state", sa.String(63), nullable=False),
        sa.Column("summary", sa.Text(), nullable=False),
        sa.Column("value", sa.Double(), nullable=True),
        sa.Column("threshold", sa.Double(), nullable=True),
        sa.Column("fired_at", sa.Double(), nullable=False),
        sa.Column("resolved_at", sa.Double(), nullable=True),
        sa.Column("muted_until", sa.Double(), nullable=True),
        sa.Column("is_announced", sa.Boolean(), nullable=False),
        sa.Column("acknowledged_by", sa.String(200), nullable=True),
        sa.Column("acknowledged_at", sa.Double(), nullable=True),
        sa.Column("note", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_alarms")),
        sa.UniqueConstraint("kind", "subject", name=op.f("uq_alarms_kind_subject")),
        sqlite_autoincrement=True,
    )


def _create_events() -> None:
    op.create_table(
        "alarm_events",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("alarm", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(63), nullable=False),
        sa.Column("subject", sa.String(200), nullable=False),
        sa.Column("state", sa.String(63), nullable=False),
        sa.Column("summary", sa.Text(), nullable=False),
        sa.Column("value", sa.Double(), nullable=True),
        sa.Column("threshold", sa.Double(), nullable=True),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("by", sa.String(200), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_alarm_events")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_alarm_events_subject"), "alarm_events", ["subject"])
    op.create_index(op.f("ix_alarm_events_at"), "alarm_events", ["at"])
