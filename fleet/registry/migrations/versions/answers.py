"""Generations that are the sum of several answers."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    with op.batch_alter_table("generations") as batch:
        batch.add_column(sa.Column("answers", sa.BigInteger(), nullable=False, server_default="1"))
