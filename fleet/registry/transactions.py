"""Transactions on the registry's database: reading and writing ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, sessionmaker

from fleet.registry.database import reading, registry_errors, writing

T = TypeVar("T")


class Transactions:
    """The transactions of one engine, for any thread.

    A database error becomes a RegistryError of one line.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._readers = sessionmaker(reading(engine))
        self._writers = sessionmaker(writing(engine))

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """Open a transaction whose queries all see the same snapshot."""
        with registry_errors(self._engine.url), self._readers() as db:
            yield db

    def write(self, work: Callable[[Session], T]) -> T:
        """Run `work` in a transaction, once more if another process wrote the same row first."""
        with registry_errors(self._engine.url):
            try:
                with self._writers.begin() as db:
                    return work(db)
            except IntegrityError:
                with self._writers.begin() as db:
                    return work(db)


class Repository:
    """The base of the registry's repositories; `actor` makes the changes, for the audit log."""

    def __init__(self, transactions: Transactions, actor: str) -> None:
        self.actor = actor
        self._transactions = transactions
