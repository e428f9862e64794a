"""`fleet stats`, `devices` and `device`, on a registry with the reports of devices."""

from __future__ import annotations

import csv
import io
import json
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fleet.cli import app
from fleet.cli.stats_plot import trend_times
from fleet.cli.stats_views import spark
from fleet.errors import ConfigError, FleetError
from fleet.protocol.access import Role
from fleet.protocol.report import DeviceStatus, Switch
from fleet.registry.stats.rollup_columns import HOUR_S
from fleet.server.fleet_options import FleetOptions, resolve_config
from fleet.server.home import FleetConfig, FleetHome
from tests.fleet.conftest import add, report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet's folder whose registry holds two devices with answers and one without."""
    path = tmp_path_factory.mktemp("fleet") / "state"
    now = time.time()
    with FleetHome.create(
        path, FleetConfig(host="127.0.0.1", port=1, bundle="/no/bundle")
    ).registry() as registry:
        add(registry, "edge-1", group="kitchen")
        add(registry, "edge-2", group="attic")
        add(registry, "edge-3")
        registry.stats.record_status(
            "edge-1",
            DeviceStatus(online=True, epoch=1, bundle_id="b1", version="0.1.0", mode="auto"),
            now,
        )
        switch = Switch(3, "standalone", "the link is down")
        registry.stats.record_report(
            "edge-1", report("g1", started_at=now - 60, switches=(switch,))
        )
        registry.stats.record_report(
            "edge-2", report("g2", started_at=now - 30 * 86_400, bundle_id="b2")
        )
    return path


def fleet(folder: Path, *arguments: str) -> str:
    result = CliRunner().invoke(
        app, [*arguments, "--home", str(folder)], env={"COLUMNS": "150", "NO_COLOR": "1"}
    )
    if result.exception is not None:
        raise result.exception
    return result.stdout


def fleet_json(folder: Path, *arguments: str) -> Any:
    return json.loads(fleet(folder, *arguments, "--json"))


def test_the_table_shows_sources_latency_and_changes_of_mode(
    folder: Path,
) -> None:
    out = fleet(folder, "stats")
    for words in (
        "edge-1",
        "online",
        "exit:8 5 (50.0%)",
        "cloud 2 (20.0%)",
        "20.0%",
        "1 time standalone: the link is",
        "seen never",
        "2,000",
    ):
        assert words in out


@pytest.mark.parametrize(
    ("by", "key", "values"),
    [("group", "group", ["attic", "kitchen"]), ("bundle", "bundle_id", ["b1", "b2"])],
)
def test_rows_by_group_and_bundle(folder: Path, by: str, key: str, values: list[str]) -> None:
    rows = fleet_json(folder, "stats", "--by", by)
    assert [row[key] for row in rows] == values
    assert [row["tokens"] for row in rows] == [10, 10]
    assert values[0] in fleet(folder, "stats", "--by", by)


def test_rows_by_the_hour_are_of_the_last_day_by_default(folder: Path) -> None:
    assert [row["tokens"] for row in fleet_json(folder, "stats", "--by", "hour")] == [10]
    assert [
        row["tokens"] for row in fleet_json(folder, "stats", "--by", "hour", "--since", "40d")
    ] == [10, 10]


def test_stats_of_a_device_a_group_and_a_span(folder: Path) -> None:
    assert [row["device"] for row in fleet_json(folder, "stats", "edge-2")] == ["edge-2"]
    assert [row["device"] for row in fleet_json(folder, "stats", "--group", "kitchen")] == [
        "edge-1"
    ]
    assert [row["tokens"] for row in fleet_json(folder, "stats", "--since", "24h")] == [10, 0, 0]


def test_the_csv_has_a_column_for_each_source(folder: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(fleet(folder, "stats", "--csv"))))
    columns = ("device", "tokens", "exit:8", "fallback", "switches")
    assert [tuple(row[column] for column in columns) for row in rows] == [
        ("edge-1", "10", "5", "1", "1"),
        ("edge-2", "10", "5", "1", "0"),
        ("edge-3", "0", "0", "0", "0"),
    ]


def test_csv_of_nothing_is_a_header(folder: Path) -> None:
    assert fleet(folder, "stats", "edge-3", "--csv", "--by", "hour").strip() == "switches"


@pytest.mark.parametrize("by", ["device", "hour"])
@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_a_plot_is_a_picture_of_the_kind_that_its_name_says(
    folder: Path, tmp_path: Path, by: str, suffix: str, begins: bytes
) -> None:
    path = tmp_path / f"stats{suffix}"
    fleet(folder, "stats", "--by", by, "--since", "40d", "--plot", str(path))
    assert path.read_bytes().startswith(begins)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--plot", "/no/folder/x.png"), "--plot /no/folder/x.png: expected a file"),
        (("--plot", "stats.jpeg"), r"expected a file named \*.png or \*.svg"),
        (("--csv", "--json"), "exclude each other"),
        (("--since", "yesterday"), "expected a span like 30m"),
        (("--since", "9998-12-31"), "expected a time before now, got one in the future"),
        (("oven",), "unknown device 'oven'"),
    ],
)
def test_invalid_options_are_an_error_of_one_line(
    folder: Path, arguments: tuple[str, ...], says: str
) -> None:
    with pytest.raises(FleetError, match=says) as raised:
        fleet(folder, "stats", *arguments)
    assert "\n" not in str(raised.value)


def test_devices_by_group_and_by_presence(folder: Path) -> None:
    assert [row["device"] for row in fleet_json(folder, "devices")] == [
        "edge-1",
        "edge-2",
        "edge-3",
    ]
    assert [row["device"] for row in fleet_json(folder, "devices", "--group", "attic")] == [
        "edge-2"
    ]
    assert [row["device"] for row in fleet_json(folder, "devices", "--online")] == ["edge-1"]
    assert [row["device"] for row in fleet_json(folder, "devices", "--offline")] == [
        "edge-2",
        "edge-3",
    ]


def test_one_device_in_detail(folder: Path) -> None:
    shown = fleet_json(folder, "device", "edge-1")
    assert (shown["device"]["mode"], shown["stats"]["tokens"]) == ("auto", 10)
    assert [session["session"] for session in shown["sessions"]] == ["s1"]
    out = fleet(folder, "device", "edge-1")
    for words in (
        "kitchen",
        "token sources",
        "1 time standalone: the link is down",
        "latest sessions",
    ):
        assert words in out


def test_a_trend_of_one_point_is_not_drawn(folder: Path) -> None:
    assert "trend" not in fleet(folder, "stats", "edge-1", "--since", "1h")


def test_the_trend_of_a_plot_has_dates(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "stats.svg"
    fleet(folder, "stats", "edge-1", "--since", "3h", "--plot", str(path))
    assert re.search(r"\d\d:00<", path.read_text())


def test_a_point_of_a_trend_is_at_the_begin_of_its_span() -> None:
    at = datetime(2026, 11, 30, 8, 40, tzinfo=UTC).timestamp()
    assert [f"{each:%d %H:%M}" for each in trend_times(2, at, at + HOUR_S)] == [
        "30 08:00",
        "30 09:00",
    ]


def test_a_bar_of_rates() -> None:
    assert spark([0.0, None, 0.5, 1.0]) == "▁·▅█"


def test_a_fleet_keeps_its_registry_and_retention_by_default(tmp_path: Path) -> None:
    registry = f"sqlite:///{tmp_path}/other.sqlite"
    options = FleetOptions(bundle="/no/bundle", registry=registry, retention_days=30)
    first = resolve_config(tmp_path, options)
    FleetHome.create(tmp_path, first)
    assert resolve_config(tmp_path, FleetOptions(bundle="/no/bundle")) == first
    changed = FleetOptions(bundle="/no/bundle", registry=registry, retention_days=7)
    assert resolve_config(tmp_path, changed).retention_days == 7
    with pytest.raises(ConfigError, match="are enrolled in a different registry"):
        resolve_config(
            tmp_path, FleetOptions(bundle="/no/bundle", registry="postgresql://elsewhere/fleet")
        )


def test_a_registry_that_cannot_be_opened_is_not_written_down(tmp_path: Path) -> None:
    config = FleetConfig(
        host="127.0.0.1",
        port=1,
        bundle="/no/bundle",
        registry="postgresql://fleet:secret@127.0.0.1:1/fleet",
    )
    with pytest.raises(FleetError, match="is not available") as raised:
        FleetHome.create(tmp_path, config)
    assert "secret" not in str(raised.value)
    assert not (tmp_path / "fleet.json").exists()


def test_only_the_operator_can_read_where_the_registry_is(folder: Path) -> None:
    assert (folder / "fleet.json").stat().st_mode & 0o077 == 0
    assert Role.SERVER in {row["role"] for row in _identities(folder)}


def _identities(folder: Path) -> list[dict[str, Any]]:
    with FleetHome.load(folder).registry() as registry:
        return [{"role": row.role} for row in registry.identities.all()]
