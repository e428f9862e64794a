"""Names of bundles, bundles that were removed, and roll-ups by the mode of the answers.

The mode of the answers in earlier roll-ups is not known: it is empty.
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

KEY = ["span_s", "start", "device", "bundle_id", "mode"]


def upgrade() -> None:
    # Never by a copy of the table: roll-outs refer to its rows.
    with op.batch_alter_table("bundles", recreate="never") as batch:
        batch.add_column(sa.Column("name", sa.String(63), nullable=True))
        batch.add_column(sa.Column("removed_at", sa.Double(), nullable=True))
        batch.create_index(op.f("ix_bundles_name"), ["name"], unique=True)
    mode = sa.Column("mode", sa.String(63), nullable=False, server_default="")
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    with op.batch_alter_table(
        "rollups",
        recreate="always" if is_sqlite else "never",
        table_kwargs={"sqlite_with_rowid": False},
    ) as batch:
        # In SQLite next to the key: else `PRAGMA quick_check` reports errors that are none.
        batch.add_column(mode, insert_after="bundle_id" if is_sqlite else None)
        batch.drop_constraint(op.f("pk_rollups"), type_="primary")
        batch.create_primary_key(op.f("pk_rollups"), KEY)
