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
Rows = list[dict[str, Any]]


def old_report(i: int) -> GenerationReport:
    """One an hour; the last began half an hour before now."""
    return report(
        f"g{i}", started_at=NOW - 1800 - 3600 * i, ttft_ms=2.0 * 1.5**i, tpot_ms=1.0 + i, session=None, worker=None,
        finish_reason="error" if i % 5 == 0 else "stop",
    )  # fmt: skip


def make_old_registry(url: str, version: str) -> None:
    """One that `version` made in an empty database: two devices, of which one is revoked, and an app, all in use."""
    engine = _engine(url)
    with engine.begin() as connection:
        config = alembic_config()
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "0001")
        _add_identities(connection)
        _add_answers(connection)
        alembic.command.upgrade(config, version)
        if version >= "0002":
            connection.execute(
                text(
                    'UPDATE generations SET verifies = 3, drafted = 9, switches = \'[[4, "a", "b"]]\''
                )
            )
            connection.execute(
                text("UPDATE rollups SET verifies = 3 * answers, drafted = 9 * answers")
            )
        if version >= "0003":
            connection.execute(text("UPDATE generations SET answers = 2 WHERE generation = 'g1'"))
    engine.dispose()


def rows_of(url: str) -> dict[str, Rows]:
    """Every row of every table, in an order of its own."""
    engine = _engine(url)
    with engine.connect() as connection:
        quote = connection.dialect.identifier_preparer.quote
        found = {
            table: [
                dict(row)
                for row in connection.execute(text(f"SELECT * FROM {quote(table)}")).mappings()
            ]
            for table in inspect(connection).get_table_names()
        }
    engine.dispose()
    return {table: sorted(rows, key=str) for table, rows in found.items()}


def _engine(url: str) -> Engine:
    """As an earlier version opened it: SQLite minds foreign keys only when it is told to."""
    engine = create_engine(parse_url(url))
    if engine.name == "sqlite":
        event.listen(
            engine, "connect", lambda connection, _: connection.execute("PRAGMA foreign_keys=ON")
        )
    return engine


def _add_identities(connection: Connection) -> None:
    for name, role, group, revoked in (
        ("app-1", "app", None, False), ("edge-1", "device", "north", False), ("edge-2", "device", "north", True),
    ):  # fmt: skip
        connection.execute(
            text(
                'INSERT INTO identities (name, role, "group", fingerprint, created_at, not_after, revoked) '
                "VALUES (:name, :role, :group, :fingerprint, 5, 2e9, :revoked)"
            ),
            {
                "name": name,
                "role": role,
                "group": group,
                "fingerprint": f"f-{name}",
                "revoked": revoked,
            },
        )
    for target in ("edge-1", "north"):
        connection.execute(
            text("INSERT INTO allowed_targets (app, target) VALUES ('app-1', :to)"), {"to": target}
        )
    for device, online in (("edge-1", True), ("edge-2", False)):
        connection.execute(
            text(
                "INSERT INTO device_status (device, online, epoch, bundle_id, version, mode, last_seen) "
                "VALUES (:device, :online, 7, 'b1', '0.1', 'auto', 1000)"
            ),
            {"device": device, "online": online},
        )


def _add_answers(connection: Connection) -> None:
    session = connection.scalar(
        text(
            "INSERT INTO sessions (device, session, worker, opened_at) "
            "VALUES ('edge-1', 's1', 'worker-1', 1000) RETURNING id"
        )
    )
    names = [
        "generation", "app", "request", "mode", "bundle_id", "started_at", "prompt_tokens", "tokens", "assists",
        "bytes_up", "bytes_down", "ttft_ms", "tpot_ms", "finish_reason",
    ]  # fmt: skip
    values = ", ".join(f":{name}" for name in names)
    for i in range(NUM_REPORTS):
        old = msgspec.to_builtins(old_report(i))
        generation = connection.scalar(
            text(
                f"INSERT INTO generations (device, session_id, {', '.join(names)}) "
                f"VALUES ('edge-1', :session, {values}) RETURNING id"
            ),
            {name: old[name] for name in names} | {"session": session},
        )
        for source, tokens in old["sources"].items():
            connection.execute(
                text(
                    "INSERT INTO token_counts (generation_id, source, tokens) VALUES (:id, :source, :tokens)"
                ),
                {"id": generation, "source": source, "tokens": tokens},
            )
