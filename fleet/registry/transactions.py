"""Transactions on the registry's database: what reads, and what writes."""

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
    """Of one engine, for any thread. What the database raises becomes a RegistryError of one line."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._readers = sessionmaker(reading(engine))
        self._writers = sessionmaker(writing(engine))

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A transaction whose questions all see one moment."""
        with registry_errors(self._engine.url), self._readers() as db:
            yield db

    def write(self, work: Callable[[Session], T]) -> T:
        """Runs `work` in a transaction, once more if another process has written the same row in the meantime."""
        with registry_errors(self._engine.url):
            try:
                with self._writers.begin() as db:
                    return work(db)
            except IntegrityError:
                with self._writers.begin() as db:
                    return work(db)


class Part:
    """A part of the registry's questions and changes; `actor` is who makes the changes."""

    def __init__(self, transactions: Transactions, actor: str) -> None:
        self.actor = actor
        self._transactions = transactions
