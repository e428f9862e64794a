"""`fleet bundle`: stored bundles, and roll-outs by hand, which wait without a server."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from fleet.bundles.manifest import Bundle
from fleet.bundles.verify import verify_bundle
from fleet.cli import app
from fleet.cli.options import format_span, parse_span
from fleet.cli.rollouts import progress_text
from fleet.errors import BundleError, ConfigError, FleetError, RolloutError
from fleet.protocol.desired_config import Settings
from fleet.protocol.report import DeviceStatus
from fleet.registry.results import RolloutRow
from fleet.registry.rollouts.plan import DeviceOutcome
from fleet.registry.targets import Scope, Target
from fleet.server.home import FleetConfig, FleetHome
from fleet.server.worker_pool import IDLE_S, ScalingPlan, WorkerPool, plan_scaling
from tests.fleet.conftest import add


@pytest.fixture
def fleet(tmp_path: Path, tiny_bundle: Bundle) -> FleetHome:
    home = FleetHome.create(
        tmp_path / "state", FleetConfig(host="127.0.0.1", port=1, bundle=str(tiny_bundle.folder))
    )
    with home.registry() as registry:
        for i in range(10):
            add(registry, f"d{i}", group="home" if i < 4 else "lab")
            registry.stats.record_status(
                f"d{i}", DeviceStatus(online=True, epoch=1, bundle_id="other"), 1.0
            )
    return home


def run(fleet: FleetHome, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["bundle", *arguments, "--home", str(fleet.folder)])
    if isinstance(result.exception, FleetError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def rows(fleet: FleetHome) -> list[RolloutRow]:
    return msgspec.json.decode(run(fleet, "status", "--json"), type=list[RolloutRow])


@pytest.fixture
def bundle_id(fleet: FleetHome, tiny_bundle: Bundle) -> str:
    run(fleet, "add", str(tiny_bundle.folder))
    return tiny_bundle.manifest.bundle_id


def test_an_added_bundle_is_stored_signed_and_listed(fleet: FleetHome, tiny_bundle: Bundle) -> None:
    added = msgspec.json.decode(run(fleet, "add", str(tiny_bundle.folder), "--json"))
    assert verify_bundle(Path(added["folder"]), fleet.folder / "ca" / "ca.pem").signature == "valid"
    (row,) = msgspec.json.decode(run(fleet, "list", "--json"))
    assert (row["bundle_id"], row["devices"], row["wanted"], row["rollout"]) == (
        added["bundle_id"],
        0,
        0,
        None,
    )
    assert row["num_bytes"] == sum(entry.num_bytes for entry in tiny_bundle.manifest.files)
    assert "is in" in run(fleet, "add", str(tiny_bundle.folder))


def test_a_damaged_bundle_is_refused_in_one_line(
    fleet: FleetHome, tmp_path: Path, tiny_bundle: Bundle
) -> None:
    shutil.copytree(tiny_bundle.folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "more").touch()
    with pytest.raises(
        BundleError, match=r"is not added: file .*more is not in the manifest.*fleet bundle verify"
    ):
        run(fleet, "add", str(tmp_path / "damaged"))
    assert msgspec.json.decode(run(fleet, "list", "--json")) == []


def test_a_roll_out_is_started_with_its_plan_paused_resumed_and_undone(
    fleet: FleetHome, bundle_id: str
) -> None:
    stages = ("--group", "lab", "--canary", "2", "--stages", "50,100", "--observe", "30s")
    limits = ("--max-tpot-ratio", "2", "--min-answers", "5")
    output = run(fleet, "rollout", bundle_id, *stages, *limits)
    assert output.splitlines() == [
        f"roll-out 1 of bundle {bundle_id} is started; see 'fleet bundle status'",
        f"it waits: no worker serves bundle {bundle_id}: 'fleet up' starts one; "
        "elsewhere start one with --bundle",
    ]
    (row,) = rows(fleet)
    assert (row.state, row.stage, row.num_stages, row.num_targets) == ("waiting", 0, 3, 6)
    assert row.doing.startswith(f"no worker serves bundle {bundle_id}")
    assert (row.plan["group"], row.plan["canary"], row.plan["percentages"]) == ("lab", 2, [50, 100])
    assert (row.plan["observe_s"], row.plan["take_within_s"]) == (30.0, 1800.0)
    assert (row.plan["limits"]["max_tpot_ratio"], row.plan["limits"]["max_offload_increase"]) == (
        2.0,
        0.1,
    )
    assert run(fleet, "pause").startswith("roll-out 1 ")
    assert rows(fleet)[0].state == "paused"
    assert msgspec.json.decode(run(fleet, "resume", "1", "--json"))["state"] == "waiting"
    assert "is undone" in run(fleet, "rollback")
    assert (rows(fleet)[0].state, rows(fleet)[0].reason) == ("undone", "by hand")


def test_the_list_names_the_open_roll_out_of_a_bundle(fleet: FleetHome, bundle_id: str) -> None:
    run(fleet, "rollout", bundle_id)
    (row,) = msgspec.json.decode(run(fleet, "list", "--json"))
    assert (row["rollout"], row["rollout_state"]) == (1, "waiting")
    shown = run(fleet, "list")
    assert bundle_id in shown
    assert "waiting" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rollout", "b-none"), "unknown bundle 'b-none': there are none"),
        (("pause",), "no roll-out is open"),
        (("rollback", "3"), "unknown roll-out 3"),
        (("status", "3"), "unknown roll-out 3"),
        (("rollout", "b", "--stages", "10,x"), "stages '10,x': expected percentages"),
        (
            ("rollout", "b", "--stages", "10,50"),
            "stages '10,50': expected growing percentages that end with 100",
        ),
        (("rollout", "b", "--observe", "10"), "span '10': expected a number with its unit"),
        (("rollout", "b", "--max-error-rate", "2"), "plan is not usable"),
    ],
)
def test_an_impossible_command_is_one_clear_line(
    fleet: FleetHome, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(fleet, *arguments)


def test_a_second_roll_out_over_the_same_devices_is_refused(
    fleet: FleetHome, bundle_id: str
) -> None:
    run(fleet, "rollout", bundle_id, "--group", "lab")
    with pytest.raises(RolloutError, match=r"roll-out 1 .* is waiting over the same devices"):
        run(fleet, "rollout", bundle_id)


def test_the_progress_of_a_roll_out_in_a_few_lines() -> None:
    row = RolloutRow(
        id=3, bundle_id="b-new", group=None, state="running",
        stage=2, num_stages=4, num_targets=20, num_told=5,
        devices={
            DeviceOutcome.PENDING: 0, DeviceOutcome.TAKEN: 4,
            DeviceOutcome.FAILED: 0, DeviceOutcome.ABSENT: 1,
        },
        answers=1234, findings=("fine: errors 0.0%, limit 5.0%",),
        doing="watched for 12 of 600 s", reason="no worse than before",
        started_at=100.0, stage_at=150.0, ended_at=None, plan={},
    )  # fmt: skip
    assert progress_text(row, 1300.0).plain.splitlines() == [
        "roll-out 3: bundle b-new to all devices, running",
        "  ██████░░░░░░░░░░░░░░░░░░ stage 2 of 4, 5 of 20 devices, 1,200 s",
        "  4 taken, 1 absent; 1,234 answers",
        "  fine: errors 0.0%, limit 5.0%",
        "  watched for 12 of 600 s",
    ]


def test_a_bundle_is_added_under_a_name_that_every_command_accepts(
    fleet: FleetHome, tiny_bundle: Bundle
) -> None:
    bundle_id = tiny_bundle.manifest.bundle_id
    output = run(fleet, "add", str(tiny_bundle.folder), "--name", "spring")
    assert output.endswith("next: fleet bundle rollout spring\n")
    assert f"bundle {bundle_id} (spring) is started" in run(fleet, "rollout", "spring")
    assert rows(fleet)[0].bundle_name == "spring"
    assert f"bundle {bundle_id} (spring) to all devices" in run(fleet, "status")
    assert "spring" in run(fleet, "list")
    run(fleet, "rename", bundle_id[:6], "summer")
    (row,) = msgspec.json.decode(run(fleet, "list", "--json"))
    assert row["name"] == "summer"
    arguments = ["config", "set", "bundle=summer", "--all", "--json", "--home", str(fleet.folder)]
    result = CliRunner().invoke(app, arguments)
    assert msgspec.json.decode(result.output)["settings"] == {"bundle": bundle_id}


def test_a_bundle_with_a_name_that_is_not_plain_is_not_kept(
    fleet: FleetHome, tiny_bundle: Bundle
) -> None:
    with pytest.raises(RolloutError, match="name 'a b': expected"):
        run(fleet, "add", str(tiny_bundle.folder), "--name", "a b")
    assert not fleet.bundles.exists()


def test_a_removed_bundle_leaves_the_disk(fleet: FleetHome, bundle_id: str, tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match="the fleet serves it by its configuration"):
        run(fleet, "remove", bundle_id)
    config = msgspec.structs.replace(fleet.config, bundle=str(tmp_path / "none"))
    FleetHome(fleet.folder, config).save()
    (row,) = msgspec.json.decode(run(fleet, "list", "--json"))
    files = [path for path in (fleet.bundles / bundle_id).rglob("*") if path.is_file()]
    assert row["disk_bytes"] == sum(path.stat().st_size for path in files)
    own = [path.stat().st_size for path in files if path.stat().st_nlink == 1]
    removed = msgspec.json.decode(run(fleet, "remove", bundle_id[:4], "--json"))
    assert removed == {"bundle_id": bundle_id, "freed_bytes": sum(own)}
    assert list(fleet.bundles.iterdir()) == []
    assert msgspec.json.decode(run(fleet, "list", "--json")) == []


def test_a_bundle_without_files_is_listed_as_such(fleet: FleetHome, bundle_id: str) -> None:
    shutil.rmtree(fleet.bundles / bundle_id)
    assert msgspec.json.decode(run(fleet, "list", "--json"))[0]["disk_bytes"] is None
    assert "no files" in run(fleet, "list")


def test_a_restored_fleet_names_the_bundles_without_files(
    fleet: FleetHome, bundle_id: str, tmp_path: Path
) -> None:
    config = msgspec.structs.replace(fleet.config, bundle=str(tmp_path / "none"))
    FleetHome(fleet.folder, config).save()
    run(fleet, "rename", bundle_id, "spring")
    file = str(tmp_path / "backup.tar.gz")
    lines = []
    for bundles in ([], ["--bundles"]):
        back_up = ["backup", f"{file}{len(bundles)}", *bundles, "--home", str(fleet.folder)]
        assert CliRunner().invoke(app, back_up).exit_code == 0
        new = ["--home", str(tmp_path / f"new{len(bundles)}")]
        lines.append(CliRunner().invoke(app, ["restore", back_up[1], *new]).output)
    assert f"without files are bundles {bundle_id} (spring): add each one again" in lines[0]
    assert "without files" not in lines[1]


def test_no_worker_starts_for_a_bundle_without_files(fleet: FleetHome, bundle_id: str) -> None:
    with fleet.registry() as registry:
        registry.desired_state.change_settings(
            Target(Scope.ALL), lambda _: Settings(bundle=bundle_id)
        )
    with WorkerPool(home=fleet, default="", num_workers=0, shares=False) as pool:
        assert pool._desired_bundles() == {bundle_id}
        shutil.rmtree(fleet.bundles / bundle_id)
        assert pool._desired_bundles() == set()


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30.0), ("10m", 600.0), ("1.5h", 5400.0), ("2d", 172_800.0)]
)
def test_spans_have_a_unit(text: str, seconds: float) -> None:
    assert parse_span(text) == seconds
    assert parse_span(format_span(seconds)) == seconds


@pytest.mark.parametrize(
    ("desired", "served", "last_desired", "expected"),
    [
        ({"b1"}, (), {}, ScalingPlan(["b1"], [])),
        ({"b1"}, ("b1",), {}, ScalingPlan([], [])),
        ({"b1"}, (), {"b1": 1000.0}, ScalingPlan([], [])),
        ((), (), {"b1": 1000.0 - IDLE_S + 1}, ScalingPlan([], [])),
        ((), (), {"b1": 1000.0 - IDLE_S}, ScalingPlan([], ["b1"])),
        ({"b2"}, (), {"b1": 0.0, "b2": 0.0}, ScalingPlan([], ["b1"])),
    ],
)
def test_a_worker_is_started_for_a_bundle_without_workers_and_stopped_after_an_idle_time(
    desired: set[str],
    served: tuple[str, ...],
    last_desired: dict[str, float],
    expected: ScalingPlan,
) -> None:
    assert plan_scaling(desired, served, last_desired, 1000.0) == expected
