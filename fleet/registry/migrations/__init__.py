"""Alembic's migrations, run when a registry is opened."""
