"""The registry: the fleet's database, and the repositories that read and write it."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Self

from sqlalchemy import Engine

from fleet.registry.alarms.repository import AlarmRepository
from fleet.registry.audit import AuditLog
from fleet.registry.database import open_database
from fleet.registry.identities.key_repository import ApiKeyRepository
from fleet.registry.identities.repository import IdentityRepository
from fleet.registry.operators.repository import OperatorRepository
from fleet.registry.rollouts.repository import RolloutRepository
from fleet.registry.settings import DesiredStateRepository
from fleet.registry.stats.repository import StatsRepository
from fleet.registry.transactions import Transactions
from fleet.utils.paths import user_name


class Registry:
    """One open database and its repositories, for any thread and several processes.

    `actor` makes the changes that are recorded in the audit log.
    """

    def __init__(self, engine: Engine, actor: str) -> None:
        transactions = Transactions(engine)
        self.actor = actor
        self.identities = IdentityRepository(transactions, actor)
        self.api_keys = ApiKeyRepository(transactions, actor)
        self.operators = OperatorRepository(transactions, actor)
        self.desired_state = DesiredStateRepository(transactions, actor)
        self.rollouts = RolloutRepository(transactions, actor)
        self.stats = StatsRepository(transactions, actor)
        self.alarms = AlarmRepository(transactions, actor)
        self.audit_log = AuditLog(transactions, actor)
        self._engine = engine

    @classmethod
    def open(cls, url_or_path: str | Path, actor: str | None = None) -> Registry:
        """Open a SQLite file, or a database by its SQLAlchemy URL; create or migrate its tables.

        `actor` is by default the user at this host.

        Raises:
            RegistryError: it cannot be opened.
            MissingExtraError: its driver is not installed.
        """
        engine = open_database(url_or_path)
        return cls(engine, actor or f"{user_name()}@{socket.gethostname()}")

    def acting_as(self, actor: str) -> Registry:
        """Return this database for the changes of another actor; only one of the two is closed."""
        return Registry(self._engine, actor)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
