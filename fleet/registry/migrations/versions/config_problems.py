"""A device's `config_error` as an object with a code, a message, and whether it is final."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

NOT_YET = "not yet: "
"""The prefix of a text that is not final: the device tries again by itself."""


def upgrade() -> None:
    texts = sa.table("device_status", sa.column("device"), sa.column("config_error"))
    rows = op.get_bind().execute(sa.select(texts).where(texts.c.config_error != "")).all()
    with op.batch_alter_table("device_status") as batch:
        batch.drop_column("config_error")
    with op.batch_alter_table("device_status") as batch:
        batch.add_column(sa.Column("config_error", sa.JSON(), nullable=True))
    problems = sa.table("device_status", sa.column("device"), sa.column("config_error", sa.JSON()))
    for device, text in rows:
        is_final = not text.startswith(NOT_YET)
        problem = {"code": "unknown", "message": text, "is_final": is_final}
        op.execute(
            sa.update(problems).where(problems.c.device == device).values(config_error=problem)
        )
