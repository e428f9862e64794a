"""Alembic runs this for each command; the connection comes from `fleet.registry.database`."""

from alembic import context

from fleet.registry.stats.rollup_tables import ROLLUPS

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=ROLLUPS.metadata,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
