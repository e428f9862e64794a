"""A device's `software_error`: why it does not run the desired version of its software."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    with op.batch_alter_table("device_status") as batch:
        batch.add_column(sa.Column("software_error", sa.JSON(), nullable=True))
