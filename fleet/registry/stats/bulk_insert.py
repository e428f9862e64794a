"""Insertion of many rows at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias

import msgspec
from sqlalchemy import (
    ColumnElement,
    Integer,
    Select,
    Table,
    Text,
    bindparam,
    cast,
    column,
    func,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

BulkInsert: TypeAlias = postgresql.Insert | sqlite.Insert


def insert_into(db: Session, table: Table) -> BulkInsert:
    """Return an INSERT that supports ON CONFLICT, which differs by dialect."""
    if db.get_bind().dialect.name == "postgresql":
        return postgresql.insert(table)
    return sqlite.insert(table)


def execute_rows(
    db: Session,
    insert: BulkInsert,
    table: Table,
    rows: Sequence[Mapping[str, Any]],
    returning: Sequence[ColumnElement[Any]] = (),
) -> Any:
    """Execute an INSERT for rows that all have the same columns, and return some of them.

    PostgreSQL gets one statement with one JSON parameter: a parameter for each value costs the
    client three times as much. Zeros are left out of it.
    """
    if isinstance(insert, sqlite.Insert):
        return db.execute(insert.returning(*returning) if returning else insert, rows)
    names = list(rows[0])
    amounts = {name for name in names if _is_amount(table, name)}
    sparse = [
        {name: value for name, value in row.items() if value or name not in amounts} for row in rows
    ]
    statement = insert.from_select(names, _select_json(table, tuple(names)))
    complete = statement.returning(*returning) if returning else statement
    return db.execute(complete, {"rows": msgspec.json.encode(sparse).decode()})


@cache
def _select_json(table: Table, names: tuple[str, ...]) -> Select[Any]:
    """Return the rows of the parameter `rows`, a JSON list; an absent number is 0."""
    columns = [column(name, table.columns[name].type) for name in names]
    document = cast(bindparam("rows", type_=Text), postgresql.JSON)
    rows = func.json_to_recordset(document).table_valued(*columns)
    rows = rows.render_derived(with_types=True)
    return select(*(_with_zero(table, name, rows.c[name]) for name in names))


def _with_zero(table: Table, name: str, value: ColumnElement[Any]) -> ColumnElement[Any]:
    return func.coalesce(value, 0) if _is_amount(table, name) else value


def _is_amount(table: Table, name: str) -> bool:
    column = table.columns[name]
    return isinstance(column.type, Integer) and not column.nullable
