"""The database of identities, devices, sessions, generations and roll-outs (SQLAlchemy)."""
