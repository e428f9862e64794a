"""First tables: identities, statuses, sessions, generations, tokens by source."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "identities",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("role", sa.String(length=63), nullable=False),
        sa.Column("group", sa.String(length=63), nullable=True),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("not_after", sa.Double(), nullable=False),
        sa.Column("revoked", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_identities")),
    )
    op.create_table(
        "allowed_targets",
        sa.Column("app", sa.String(length=63), nullable=False),
        sa.Column("target", sa.String(length=63), nullable=False),
        sa.ForeignKeyConstraint(
            ["app"], ["identities.name"], name=op.f("fk_allowed_targets_app"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("app", "target", name=op.f("pk_allowed_targets")),
    )
    op.create_table(
        "device_status",
        sa.Column("device", sa.String(length=63), nullable=False),
        sa.Column("online", sa.Boolean(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("bundle_id", sa.String(length=200), nullable=False),
        sa.Column("version", sa.String(length=200), nullable=False),
        sa.Column("mode", sa.String(length=200), nullable=False),
        sa.Column("last_seen", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["device"],
            ["identities.name"],
            name=op.f("fk_device_status_device"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("device", name=op.f("pk_device_status")),
    )
    op.create_table(
        "sessions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("device", sa.String(length=63), nullable=False),
        sa.Column("session", sa.String(length=63), nullable=False),
        sa.Column("worker", sa.String(length=63), nullable=True),
        sa.Column("opened_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["device"], ["identities.name"], name=op.f("fk_sessions_device")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sessions")),
        sa.UniqueConstraint("device", "session", name=op.f("uq_sessions_device_session")),
    )
    op.create_index(op.f("ix_sessions_opened_at"), "sessions", ["opened_at"], unique=False)
    op.create_table(
        "generations",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("device", sa.String(length=63), nullable=False),
        sa.Column("generation", sa.String(length=63), nullable=False),
        sa.Column("app", sa.String(length=63), nullable=False),
        sa.Column("request", sa.String(length=63), nullable=False),
        sa.Column("mode", sa.String(length=200), nullable=False),
        sa.Column("bundle_id", sa.String(length=63), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("assists", sa.BigInteger(), nullable=False),
        sa.Column("bytes_up", sa.BigInteger(), nullable=False),
        sa.Column("bytes_down", sa.BigInteger(), nullable=False),
        sa.Column("ttft_ms", sa.Double(), nullable=False),
        sa.Column("tpot_ms", sa.Double(), nullable=False),
        sa.Column("finish_reason", sa.String(length=200), nullable=False),
        sa.Column("worker", sa.String(length=63), nullable=True),
        sa.Column("session_id", sa.Integer(), nullable=True),
        sa.ForeignKeyConstraint(
            ["device"], ["identities.name"], name=op.f("fk_generations_device")
        ),
        sa.ForeignKeyConstraint(
            ["session_id"], ["sessions.id"], name=op.f("fk_generations_session_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_generations")),
        sa.UniqueConstraint("device", "generation", name=op.f("uq_generations_device_generation")),
    )
    op.create_index(
        op.f("ix_generations_device_started_at"),
        "generations",
        ["device", "started_at"],
        unique=False,
    )
    op.create_index(op.f("ix_generations_session_id"), "generations", ["session_id"], unique=False)
    op.create_table(
        "token_counts",
        sa.Column("generation_id", sa.Integer(), nullable=False),
        sa.Column("source", sa.String(length=20), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["generation_id"], ["generations.id"], name=op.f("fk_token_counts_generation_id")
        ),
        sa.PrimaryKeyConstraint("generation_id", "source", name=op.f("pk_token_counts")),
    )
