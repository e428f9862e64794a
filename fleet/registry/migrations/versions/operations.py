"""Tables of enrolment and operations, for instance tokens, tags, workers, roll-outs, audit log."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    _identities()
    _enrolment()
    _operations()
    for table in ("generations", "rollups"):
        with op.batch_alter_table(table) as batch:
            for name in ("judged", "agreed"):
                batch.add_column(
                    sa.Column(name, sa.BigInteger(), nullable=False, server_default="0")
                )
    with op.batch_alter_table("device_status") as batch:
        batch.add_column(
            sa.Column("config_version", sa.BigInteger(), nullable=False, server_default="0")
        )
        batch.add_column(
            sa.Column("config_error", sa.String(200), nullable=False, server_default="")
        )


def _identities() -> None:
    # Never by a copy of the table: dropping the old one would delete the rows that refer to it.
    with op.batch_alter_table("identities", recreate="never") as batch:
        batch.add_column(sa.Column("state", sa.String(63), nullable=False, server_default="active"))
    op.execute("UPDATE identities SET state = 'revoked' WHERE revoked")
    with op.batch_alter_table("identities", recreate="never") as batch:
        batch.drop_column("revoked")
    with op.batch_alter_table("allowed_targets") as batch:
        batch.alter_column("target", type_=sa.String(127), existing_type=sa.String(63))


def _enrolment() -> None:
    op.create_table(
        "tags",
        _name("device"),
        sa.Column("key", sa.String(63), nullable=False),
        sa.Column("value", sa.String(63), nullable=False),
        _belongs("tags", "device"),
        sa.PrimaryKeyConstraint("device", "key", name=op.f("pk_tags")),
    )
    op.create_table(
        "tokens",
        sa.Column("id", sa.String(32), nullable=False),
        _name("name"),
        sa.Column("secret_hash", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.Column("used_at", sa.Double(), nullable=True),
        sa.Column("key_hash", sa.String(64), nullable=True),
        _belongs("tokens", "name"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tokens")),
    )
    op.create_index(op.f("ix_tokens_name"), "tokens", ["name"])
    op.create_table(
        "certificates",
        sa.Column("serial", sa.String(40), nullable=False),
        _name("name"),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("key_hash", sa.String(64), nullable=False),
        sa.Column("pem", sa.Text(), nullable=False),
        sa.Column("not_before", sa.Double(), nullable=False),
        sa.Column("not_after", sa.Double(), nullable=False),
        sa.Column("revoked_at", sa.Double(), nullable=True),
        _belongs("certificates", "name"),
        sa.PrimaryKeyConstraint("serial", name=op.f("pk_certificates")),
        sa.UniqueConstraint("fingerprint", name=op.f("uq_certificates_fingerprint")),
    )
    op.create_index(op.f("ix_certificates_name"), "certificates", ["name"])


def _operations() -> None:
    op.create_table(
        "workers",
        _name("worker"),
        sa.Column("online", sa.Boolean(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("bundle_ids", sa.JSON(), nullable=False),
        sa.Column("version", sa.String(200), nullable=False),
        sa.Column("num_sessions", sa.BigInteger(), nullable=False),
        sa.Column("draining", sa.Boolean(), nullable=False),
        sa.Column("last_seen", sa.Double(), nullable=False),
        _belongs("workers", "worker"),
        sa.PrimaryKeyConstraint("worker", name=op.f("pk_workers")),
    )
    op.create_table(
        "config_changes",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("scope", sa.String(6), nullable=False),
        sa.Column("target", sa.String(63), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("changed_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_config_changes")),
    )
    op.create_index(op.f("ix_config_changes_scope_target"), "config_changes", ["scope", "target"])
    op.create_table(
        "bundles",
        sa.Column("bundle_id", sa.String(63), nullable=False),
        sa.Column("model", sa.String(200), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("added_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("bundle_id", name=op.f("pk_bundles")),
    )
    op.create_table(
        "rollouts",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("bundle_id", sa.String(63), nullable=False),
        sa.Column("state", sa.String(63), nullable=False),
        sa.Column("stage", sa.Integer(), nullable=False),
        sa.Column("plan", sa.JSON(), nullable=False),
        sa.Column("reason", sa.String(200), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("stage_at", sa.Double(), nullable=False),
        sa.Column("ended_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(
            ["bundle_id"], ["bundles.bundle_id"], name=op.f("fk_rollouts_bundle_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_rollouts")),
    )
    op.create_table(
        "audit_log",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("actor", sa.String(200), nullable=False),
        sa.Column("action", sa.String(63), nullable=False),
        sa.Column("subject", sa.String(200), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_log")),
    )


def _name(column: str) -> sa.Column[str]:
    return sa.Column(column, sa.String(63), nullable=False)


def _belongs(table: str, column: str) -> sa.ForeignKeyConstraint:
    """Return a foreign key to an identity, whose deletion deletes the row."""
    name = op.f(f"fk_{table}_{column}")
    return sa.ForeignKeyConstraint([column], ["identities.name"], name=name, ondelete="CASCADE")
