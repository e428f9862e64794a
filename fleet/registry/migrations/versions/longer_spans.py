"""Roll-ups of 16 days, added up from those of 4."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

FROM_S, TO_S = 345_600, 1_382_400


def upgrade() -> None:
    for name, about in (
        ("rollups", ("bundle_id",)),
        ("rollup_sources", ("bundle_id", "source")),
        ("rollup_switches", ("bundle_id", "mode", "reason")),
    ):
        keys = ("span_s", "start", "device", *about)
        columns = [column["name"] for column in sa.inspect(op.get_bind()).get_columns(name)]
        amounts = [column for column in columns if column not in keys]
        start, by = f"start / {TO_S} * {TO_S}", ", ".join(("device", *about))
        op.execute(
            f"INSERT INTO {name} (span_s, start, {by}, {', '.join(amounts)}) "
            f"SELECT {TO_S}, {start}, {by}, {', '.join(f'sum({amount})' for amount in amounts)} "
            f"FROM {name} WHERE span_s = {FROM_S} GROUP BY {start}, {by}"
        )
