"""A device's `event_error`: why it dropped its latest bad event."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    with op.batch_alter_table("device_status") as batch:
        batch.add_column(sa.Column("event_error", sa.JSON(), nullable=True))
