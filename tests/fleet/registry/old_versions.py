"""Registries as earlier versions of this program left them."""

from __future__ import annotations

from typing import Any, Final

import alembic.command
import msgspec
from sqlalchemy import Connection, Engine, create_engine, event, inspect, text

from fleet.protocol.report import GenerationReport
from fleet.registry.database import alembic_config, parse_url
from tests.fleet.conftest import report

NOW: Final = 40 * 86_400.0 + 1800
NUM_REPORTS: Final = 20
NOT_YET_TEXT: Final = "not yet: the registry is away"
FINAL_TEXT: Final = "the graphs do not load"
Rows = list[dict[str, Any]]

IDENTITY: Final = (
    'INSERT INTO identities (name, role, "group", fingerprint, created_at, not_after, revoked) '
    "VALUES (:name, :role, :group, :fingerprint, 5, 2e9, :revoked)"
)
STATUS: Final = (
    "INSERT INTO device_status (device, online, epoch, bundle_id, version, mode, last_seen) "
    "VALUES (:device, :online, 7, 'b1', '0.1', 'auto', 1000)"
)
SESSION: Final = (
    "INSERT INTO sessions (device, session, worker, opened_at) "
    "VALUES ('edge-1', 's1', 'worker-1', 1000) RETURNING id"
)
BUNDLE: Final = (
    "INSERT INTO bundles (bundle_id, model, num_bytes, added_at) VALUES ('b1', 'tiny', 9, 1000)"
)
ROLLOUT: Final = (
    "INSERT INTO rollouts (bundle_id, state, stage, plan, reason, started_at, stage_at, ended_at) "
    """VALUES ('b1', 'completed', 4, '{"plan": {}}', 'no worse', 1000, 1000, 2000)"""
)
GENERATION_COLUMNS: Final = (
    "generation",
    "app",
    "request",
    "mode",
    "bundle_id",
    "started_at",
    "prompt_tokens",
    "tokens",
    "assists",
    "bytes_up",
    "bytes_down",
    "ttft_ms",
    "tpot_ms",
    "finish_reason",
)
TOKENS: Final = (
    "INSERT INTO token_counts (generation_id, source, tokens) VALUES (:id, :source, :tokens)"
)


def old_report(i: int) -> GenerationReport:
    """Return one report an hour; the last began half an hour before now."""
    return report(
        f"g{i}",
        started_at=NOW - 1800 - 3600 * i,
        ttft_ms=2.0 * 1.5**i,
        tpot_ms=1.0 + i,
        session=None,
        worker=None,
        finish_reason="error" if i % 5 == 0 else "stop",
    )


def make_old_registry(url: str, version: str) -> None:
    """Fill an empty database with the tables and rows of `version`.

    It has two devices, one of which is revoked, and an app, all with statuses and answers, and from
    version 0004 on a bundle with its roll-out.
    """
    engine = _engine(url)
    with engine.begin() as connection:
        config = alembic_config()
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "0001")
        _add_identities(connection)
        _add_answers(connection)
        alembic.command.upgrade(config, version)
        _add_later_columns(connection, version)
    engine.dispose()


def _add_later_columns(connection: Connection, version: str) -> None:
    if version >= "0002":
        switches = '[[4, "a", "b"]]'
        connection.execute(
            text(f"UPDATE generations SET verifies = 3, drafted = 9, switches = '{switches}'")
        )
        connection.execute(text("UPDATE rollups SET verifies = 3 * answers, drafted = 9 * answers"))
    if version >= "0003":
        connection.execute(text("UPDATE generations SET answers = 2 WHERE generation = 'g1'"))
    if version >= "0004":
        connection.execute(text(BUNDLE))
        connection.execute(text(ROLLOUT))
    if "0004" <= version < "0006":
        update = text("UPDATE device_status SET config_error = :error WHERE device = :device")
        for device, error in (("edge-1", NOT_YET_TEXT), ("edge-2", FINAL_TEXT)):
            connection.execute(update, {"device": device, "error": error})


def rows_of(url: str) -> dict[str, Rows]:
    """Return every row of every table, in a stable order."""
    engine = _engine(url)
    with engine.connect() as connection:
        quote = connection.dialect.identifier_preparer.quote
        tables = {
            table: [
                dict(row)
                for row in connection.execute(text(f"SELECT * FROM {quote(table)}")).mappings()
            ]
            for table in inspect(connection).get_table_names()
        }
    engine.dispose()
    return {table: sorted(rows, key=str) for table, rows in tables.items()}


def _engine(url: str) -> Engine:
    """Return an engine as an earlier version did: SQLite checks foreign keys only on request."""
    engine = create_engine(parse_url(url))
    if engine.name == "sqlite":
        event.listen(
            engine, "connect", lambda connection, _: connection.execute("PRAGMA foreign_keys=ON")
        )
    return engine


def _add_identities(connection: Connection) -> None:
    for name, role, group, is_revoked in (
        ("app-1", "app", None, False),
        ("edge-1", "device", "north", False),
        ("edge-2", "device", "north", True),
    ):
        values = {
            "name": name,
            "role": role,
            "group": group,
            "fingerprint": f"f-{name}",
            "revoked": is_revoked,
        }
        connection.execute(text(IDENTITY), values)
    for target in ("edge-1", "north"):
        connection.execute(
            text("INSERT INTO allowed_targets (app, target) VALUES ('app-1', :to)"), {"to": target}
        )
    for device, online in (("edge-1", True), ("edge-2", False)):
        connection.execute(text(STATUS), {"device": device, "online": online})


def _add_answers(connection: Connection) -> None:
    session = connection.scalar(text(SESSION))
    columns = ", ".join(GENERATION_COLUMNS)
    values = ", ".join(f":{name}" for name in GENERATION_COLUMNS)
    insert = text(
        f"INSERT INTO generations (device, session_id, {columns}) "
        f"VALUES ('edge-1', :session, {values}) RETURNING id"
    )
    for i in range(NUM_REPORTS):
        old = msgspec.to_builtins(old_report(i))
        fields = {name: old[name] for name in GENERATION_COLUMNS}
        generation = connection.scalar(insert, fields | {"session": session})
        for source, tokens in old["sources"].items():
            row = {"id": generation, "source": source, "tokens": tokens}
            connection.execute(text(TOKENS), row)
