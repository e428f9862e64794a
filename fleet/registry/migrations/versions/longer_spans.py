"""Roll-ups of 2, 8 and 16 days, added up from those of 1 and 4 days.

The tokens of the cloud and of the fallback are columns: their rows are deleted.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

DAY_S = 86_400
SPANS_S = ((DAY_S, 2 * DAY_S), (4 * DAY_S, 8 * DAY_S), (4 * DAY_S, 16 * DAY_S))


def upgrade() -> None:
    op.execute("DELETE FROM rollup_sources WHERE source IN ('cloud', 'fallback')")
    for name, about in (
        ("rollups", ("bundle_id",)),
        ("rollup_sources", ("bundle_id", "source")),
        ("rollup_switches", ("bundle_id", "mode", "reason")),
    ):
        keys = ("span_s", "start", "device", *about)
        columns = [column["name"] for column in sa.inspect(op.get_bind()).get_columns(name)]
        amounts = [column for column in columns if column not in keys]
        sums = ", ".join(f"sum({amount})" for amount in amounts)
        by = ", ".join(("device", *about))
        for from_s, to_s in SPANS_S:
            start = f"start / {to_s} * {to_s}"
            op.execute(
                f"INSERT INTO {name} (span_s, start, {by}, {', '.join(amounts)}) "
                f"SELECT {to_s}, {start}, {by}, {sums} "
                f"FROM {name} WHERE span_s = {from_s} GROUP BY {start}, {by}"
            )
