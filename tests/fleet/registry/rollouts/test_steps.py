"""Whole roll-outs, driven by statuses and reports in the registry, with a simulated clock."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from fleet.errors import RolloutError
from fleet.protocol.access import Role
from fleet.protocol.desired_config import Settings
from fleet.protocol.report import ConfigProblem, DeviceStatus
from fleet.registry.database import parse_url
from fleet.registry.models import WorkerRecord
from fleet.registry.results import RolloutRow
from fleet.registry.rollouts.plan import RolloutPlan
from fleet.registry.rollouts.states import RolloutEvent
from fleet.registry.store import Registry
from fleet.registry.targets import Scope, Target
from fleet.server.rollout_engine import RolloutEngine
from tests.fleet.conftest import add, report
from tests.postgresql import READY, Databases

OLD = "b-old"
NEW = "b-new"
DEVICES = [f"d{i}" for i in range(10)]
START = 1_000_000_000.0
FIRST_ANSWERS = 10  # of each device, before the tests begin
FILLED = "filled"  # the template of a site's database
PLAN = RolloutPlan(
    percentages=(20, 50, 100), observe_s=60.0, take_within_s=300.0, offline_after_s=30.0
)
Answer = dict[str, object]
GOOD: Answer = {"sources": {"cloud": 2, "exit:8": 8}}
BAD: Answer = {"sources": {"cloud": 9, "exit:8": 1}}


class Site:
    """Ten devices on the old bundle, and a worker that serves both bundles."""

    def __init__(self, registry: Registry, url: str) -> None:
        self.registry = registry
        self.now = START
        self.engine = self.new_engine()
        self._generations = itertools.count()
        self._database = create_engine(parse_url(url))

    def fill(self) -> None:
        """Write the devices, their bundles and their first answers into an empty registry."""
        for device in DEVICES:
            add(self.registry, device, group="home" if device < "d4" else "lab")
            self.publish(device, OLD)
        add(self.registry, "worker-1", Role.WORKER)
        self.serves(OLD, NEW)
        for bundle_id in (OLD, NEW):
            self.registry.rollouts.add_bundle(bundle_id, "tiny", 1000)
        state = self.registry.desired_state
        state.change_settings(Target(Scope.ALL), lambda _: Settings(bundle=OLD))
        self.answers(FIRST_ANSWERS, GOOD)

    def begin_tests(self) -> None:
        """Continue an hour after `fill`, with further answers."""
        self._generations = itertools.count(FIRST_ANSWERS * len(DEVICES))
        self.now += 3600.0

    def close(self) -> None:
        self._database.dispose()

    def new_engine(self) -> RolloutEngine:
        return RolloutEngine(self.registry, lambda: self.now, period_s=0.0)

    def publish(self, device: str, bundle_id: str, *, online: bool = True, error: str = "") -> None:
        problem = ConfigProblem("bad_bundle", error, is_final=True) if error else None
        status = DeviceStatus(online=online, epoch=1, bundle_id=bundle_id, config_error=problem)
        self.registry.stats.record_status(device, status, self.now)

    def serves(self, *bundle_ids: str) -> None:
        with Session(self._database) as db, db.begin():
            db.merge(
                WorkerRecord(
                    worker="worker-1",
                    online=True,
                    epoch=1,
                    bundle_ids=list(bundle_ids),
                    version="",
                    num_sessions=0,
                    draining=False,
                    last_seen=self.now,
                )
            )

    def desired_settings(self, device: str) -> Settings:
        return self.registry.desired_state.configs([device])[device].settings

    def take(self, *, but: tuple[str, ...] = ()) -> None:
        """Let every device serve its desired bundle."""
        for device in DEVICES:
            if device not in but and self.desired_settings(device).bundle:
                self.publish(device, self.desired_settings(device).bundle or "")

    def answers(self, count: int, answer: Answer) -> None:
        """Record `count` answers of each device; those of the old bundle are always good."""
        made = {}
        for row in self.registry.stats.devices():
            values = (answer if row.bundle_id == NEW else GOOD) | {
                "bundle_id": row.bundle_id,
                "started_at": self.now,
            }
            for _ in range(count):
                each = report(f"g{next(self._generations)}", **values)
                made[row.device, each.generation] = each
        self.registry.stats.record_reports(made)

    def step(self, seconds: float = 5.0) -> RolloutRow:
        self.now += seconds
        self.engine.step()
        return self.row()

    def row(self) -> RolloutRow:
        return self.registry.rollouts.latest(self.now)[0]

    def on(self, bundle_id: str) -> list[str]:
        """Return the devices whose desired bundle it is."""
        configs = self.registry.desired_state.configs()
        return [device for device, config in configs.items() if config.settings.bundle == bundle_id]

    def stage(self, answer: Answer) -> RolloutRow:
        """Let the devices install the bundle, and answer while they are watched."""
        self.take()
        self.step()
        self.answers(30, answer)
        self.now += PLAN.observe_s
        return self.step()

    def begin(self, plan: RolloutPlan = PLAN) -> RolloutRow:
        self.registry.rollouts.start(NEW, plan, self.now)
        self.step()
        return self.step()


@pytest.fixture(scope="module")
def filled_sqlite(ready_sqlite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the SQLite file of a site."""
    path = tmp_path_factory.mktemp(FILLED) / "registry.sqlite"
    shutil.copy(ready_sqlite, path)
    fill(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="module")
def filled_postgresql(postgresql: Databases) -> Databases:
    """Return the databases with the template `FILLED`, that of a site."""
    fill(postgresql.server.create(FILLED, READY))
    return postgresql


def fill(url: str) -> None:
    with Registry.open(url) as registry, closing(Site(registry, url)) as made:
        made.fill()


@pytest.fixture(params=["sqlite", "postgresql"])
def registry_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Return the URL of a site's database."""
    if request.param == "sqlite":
        path = shutil.copy(request.getfixturevalue("filled_sqlite"), tmp_path)
        yield f"sqlite:///{path}"
        return
    databases: Databases = request.getfixturevalue("filled_postgresql")
    with databases.registry(FILLED) as url:
        yield url


@pytest.fixture
def site(registry: Registry, registry_url: str) -> Iterator[Site]:
    with closing(Site(registry, registry_url)) as made:
        made.begin_tests()
        yield made


def own_settings(site: Site) -> dict[str, Settings]:
    return {
        device: site.registry.desired_state.settings(Target(Scope.DEVICE, device))
        for device in DEVICES
    }


def test_a_good_bundle_goes_through_every_stage_to_all(site: Site) -> None:
    row = site.begin()
    assert (row.state, row.stage, site.on(NEW)) == ("running", 1, ["d0"])
    for number, count in ((2, 2), (3, 5), (4, 10)):
        row = site.stage(GOOD)
        assert (row.state, row.stage, len(site.on(NEW))) == ("running", number, count)
    row = site.stage(GOOD)
    assert (row.state, row.reason) == ("completed", "no worse than before")
    assert row.ended_at == site.now
    assert site.registry.desired_state.settings(Target(Scope.ALL)).bundle == NEW
    assert set(own_settings(site).values()) == {Settings()}
    assert site.on(NEW) == DEVICES


def test_an_undo_restores_the_served_bundle_where_no_scope_names_one(site: Site) -> None:
    site.registry.desired_state.change_settings(Target(Scope.ALL), lambda _: Settings())
    site.begin()
    site.stage(BAD)
    assert own_settings(site)["d0"] == Settings(bundle=OLD)


def test_a_bad_bundle_stops_at_the_canary_and_is_undone(site: Site) -> None:
    site.registry.desired_state.change_settings(
        Target(Scope.DEVICE, "d0"), lambda _: Settings(bundle=OLD, max_new_tokens=9)
    )
    before = own_settings(site)
    site.begin()
    assert site.on(NEW) == ["d0"]
    row = site.stage(BAD)
    assert (row.state, row.stage, row.num_told) == ("undone", 1, 1)
    assert row.reason == "offload 90.0%, before 20.0%, limit 10.0% more"
    assert own_settings(site) == before
    assert site.step().state == "undone"
    assert site.registry.audit_log.entries("rollout:1")[0].actor == "rollout 1"


def test_a_bad_bundle_is_undone_before_its_observation_is_over(site: Site) -> None:
    site.begin()
    site.take()
    site.step()
    site.answers(30, BAD)
    assert site.step().state == "undone"


def test_few_answers_lead_to_no_decision(site: Site) -> None:
    site.begin()
    site.take()
    site.step()
    site.answers(19, BAD)
    row = site.step(1000.0)
    assert (row.state, row.stage, row.doing) == ("running", 1, "19 of 20 answers")


def test_answers_before_the_stage_do_not_count(site: Site) -> None:
    site.publish("d0", NEW)
    site.answers(30, BAD)
    site.publish("d0", OLD)
    site.now += 7200.0
    site.begin()
    assert site.stage(GOOD).stage == 2


def test_a_device_that_cannot_install_the_bundle_undoes_the_roll_out_at_once(site: Site) -> None:
    site.begin()
    site.publish("d0", OLD, error="the bundle's signature is not the fleet's")
    row = site.step()
    assert (row.state, row.reason) == (
        "undone",
        "d0 reports: the bundle's signature is not the fleet's",
    )
    assert set(own_settings(site).values()) == {Settings()}


def test_a_device_that_never_installs_the_bundle_undoes_the_roll_out_at_the_deadline(
    site: Site,
) -> None:
    site.begin()
    assert site.step(299.0).state == "running"
    row = site.step(2.0)
    assert (row.state, row.reason) == ("undone", "d0 has not installed the bundle within 300 s")


def test_a_device_that_goes_offline_for_good_undoes_the_roll_out(site: Site) -> None:
    site.begin()
    site.take()
    site.step()
    site.publish("d0", "", online=False)
    assert site.step(29.0).state == "running"
    row = site.step(2.0)
    assert (row.state, row.reason) == ("undone", "d0 went offline with the bundle")


def test_an_offline_device_delays_no_other_and_installs_the_bundle_when_it_connects(
    site: Site,
) -> None:
    site.publish("d9", "", online=False)
    site.now += 60.0
    site.begin()
    for _ in range(3):
        site.stage(GOOD)
    site.publish("d9", "", online=False)  # `stage` makes every device serve its desired bundle
    assert site.on(NEW) == DEVICES
    site.now += 60.0
    site.registry.stats.record_status("d9", DeviceStatus(online=False, epoch=1), site.now)
    row = site.stage(GOOD)
    assert row.state == "completed"
    assert site.desired_settings("d9").bundle == NEW


def test_a_roll_out_fails_when_every_device_of_the_canary_is_offline(site: Site) -> None:
    for device in DEVICES:
        site.publish(device, "", online=False)
    site.now += 60.0
    assert site.begin().doing == "its devices are offline"
    row = site.step(301.0)
    assert row.state == "failed"
    assert row.reason == "no device was online to install the bundle within 300 s"
    assert set(own_settings(site).values()) == {Settings()}


def test_a_roll_out_waits_until_a_worker_serves_the_bundle_and_names_the_missing_one(
    site: Site,
) -> None:
    site.serves(OLD)
    row = site.begin()
    assert (row.state, site.on(NEW)) == ("waiting", [])
    assert row.reason.startswith("no worker serves bundle b-new: 'fleet up' starts one")
    site.serves(OLD, NEW)
    assert site.step().state == "running"
    assert site.step().stage == 1


def test_a_roll_out_waits_when_the_worker_leaves_and_watches_anew_when_it_is_back(
    site: Site,
) -> None:
    site.begin()
    site.take()
    site.step()
    site.serves(OLD)
    assert site.step().state == "waiting"
    site.answers(30, BAD)  # not the bundle's fault: no worker served it
    site.step(1000.0)
    site.serves(OLD, NEW)
    assert site.step().state == "running"


def test_a_paused_roll_out_does_nothing_until_it_is_resumed(site: Site) -> None:
    site.begin()
    site.registry.rollouts.change(None, RolloutEvent.PAUSE, site.now)
    site.publish("d0", OLD, error="no room")
    row = site.step(1000.0)
    assert (row.state, row.reason, site.on(NEW)) == ("paused", "by hand", ["d0"])
    site.publish("d0", NEW)
    site.registry.rollouts.change(1, RolloutEvent.RESUME, site.now)
    assert site.step().state == "running"
    assert site.stage(GOOD).stage == 2


@pytest.mark.parametrize("paused", [False, True])
def test_a_roll_out_is_undone_by_hand(site: Site, *, paused: bool) -> None:
    site.begin()
    if paused:
        site.registry.rollouts.change(None, RolloutEvent.PAUSE, site.now)
    assert site.registry.rollouts.change(None, RolloutEvent.UNDO, site.now) == 1
    assert (site.row().state, site.on(NEW)) == ("undone", [])
    assert set(own_settings(site).values()) == {Settings()}


def test_settings_that_an_operator_changes_meanwhile_are_kept(site: Site) -> None:
    site.begin()
    change = msgspec.structs.replace
    site.registry.desired_state.change_settings(
        Target(Scope.DEVICE, "d0"), lambda old: change(old, max_new_tokens=9)
    )
    site.registry.rollouts.change(None, RolloutEvent.UNDO, site.now)
    assert own_settings(site)["d0"] == Settings(max_new_tokens=9)


def test_its_devices_and_as_many_others_are_sampled_during_a_roll_out(site: Site) -> None:
    own = Settings(agreement_sample=0.5)
    site.registry.desired_state.change_settings(Target(Scope.DEVICE, "d1"), lambda _: own)
    site.begin()
    samples = {
        device: settings.agreement_sample
        for device, settings in own_settings(site).items()
        if settings != Settings()
    }
    assert samples == {"d0": 0.25, "d1": 0.25}
    site.stage(GOOD)
    assert site.on(NEW) == ["d0", "d1"]
    site.registry.rollouts.change(None, RolloutEvent.UNDO, site.now)
    assert own_settings(site) == dict.fromkeys(DEVICES, Settings()) | {"d1": own}


def test_a_bundle_whose_exits_agree_less_is_undone(site: Site) -> None:
    site.begin()
    sampled = {"bundle_id": OLD, "started_at": site.now, "judged": 10, "agreed": 9}
    site.registry.stats.record_reports(
        {("d1", f"c{i}"): report(f"c{i}", **sampled | GOOD) for i in range(30)}
    )
    row = site.stage(GOOD | {"judged": 10, "agreed": 6})
    assert row.state == "undone"
    assert row.reason.startswith("agreement 60.0%, before 90.0%")


def test_a_roll_out_of_a_group_changes_no_other_device(site: Site) -> None:
    site.begin(msgspec.structs.replace(PLAN, group="lab", canary=2, percentages=(100,)))
    assert site.on(NEW) == ["d4", "d5"]
    site.stage(GOOD)
    assert site.stage(GOOD).state == "completed"
    assert site.registry.desired_state.settings(Target(Scope.GROUP, "lab")) == Settings(bundle=NEW)
    assert site.registry.desired_state.settings(Target(Scope.ALL)) == Settings(bundle=OLD)
    assert site.on(NEW) == ["d4", "d5", "d6", "d7", "d8", "d9"]


def test_a_completed_roll_out_clears_the_bundle_of_narrower_scopes(site: Site) -> None:
    site.registry.desired_state.change_settings(
        Target(Scope.GROUP, "lab"), lambda _: Settings(bundle=OLD, max_new_tokens=5)
    )
    site.registry.desired_state.change_settings(
        Target(Scope.DEVICE, "d7"), lambda _: Settings(bundle=OLD)
    )
    site.begin(msgspec.structs.replace(PLAN, percentages=(100,)))
    site.stage(GOOD)
    assert site.stage(GOOD).state == "completed"
    assert site.on(NEW) == DEVICES
    assert site.registry.desired_state.settings(Target(Scope.GROUP, "lab")) == Settings(
        max_new_tokens=5
    )


def test_only_one_roll_out_is_open_over_the_same_devices(site: Site) -> None:
    site.registry.rollouts.start(NEW, RolloutPlan(group="lab"), site.now)
    for group in ("lab", None):
        with pytest.raises(
            RolloutError, match="roll-out 1 of bundle b-new is waiting over the same devices"
        ):
            site.registry.rollouts.start(OLD, RolloutPlan(group=group), site.now)
    assert site.registry.rollouts.start(OLD, RolloutPlan(group="home"), site.now) == 2
    with pytest.raises(RolloutError, match="open roll-outs are 1, 2; name one of them"):
        site.registry.rollouts.change(None, RolloutEvent.PAUSE, site.now)


@pytest.mark.parametrize(
    ("bundle_id", "plan", "message"),
    [
        ("b-none", RolloutPlan(), "unknown bundle 'b-none': there are b-new, b-old; add it"),
        (NEW, RolloutPlan(group="garden"), "no active device in the group 'garden'"),
        (NEW, RolloutPlan(canary_group="garden"), "no active device in the group 'garden'"),
        (NEW, RolloutPlan(observe_s=1e9), "observe_s: expected a number above 0 and at most"),
    ],
)
def test_a_roll_out_that_cannot_start_is_refused(
    site: Site, bundle_id: str, plan: RolloutPlan, message: str
) -> None:
    with pytest.raises(RolloutError, match=message):
        site.registry.rollouts.start(bundle_id, plan, site.now)
    assert site.registry.rollouts.latest() == []


def test_a_roll_out_that_has_ended_cannot_be_changed(site: Site) -> None:
    site.begin()
    site.registry.rollouts.change(1, RolloutEvent.UNDO, site.now)
    with pytest.raises(
        RolloutError, match="cannot undo roll-out 1, which is undone: it has ended; start another"
    ):
        site.registry.rollouts.change(1, RolloutEvent.UNDO, site.now)
    with pytest.raises(RolloutError, match="unknown roll-out 5"):
        site.registry.rollouts.change(5, RolloutEvent.UNDO, site.now)
    with pytest.raises(RolloutError, match="no roll-out is open"):
        site.registry.rollouts.change(None, RolloutEvent.UNDO, site.now)


@contextmanager
def restarted(site: Site) -> Iterator[None]:
    """Restart the server after ten minutes; it has received no status yet."""
    site.now += 600.0
    site.registry.stats.mark_all_offline()
    site.engine = site.new_engine()
    yield
    site.serves(OLD, NEW)
    for device in DEVICES:
        site.publish(device, site.desired_settings(device).bundle or OLD)


def test_a_roll_out_continues_after_a_restart_of_the_server_in_any_stage(site: Site) -> None:
    site.begin()
    for number in (2, 3, 4):
        site.take()
        site.step()
        with restarted(site):
            assert site.step().state == "waiting"  # for the status of a worker
        assert site.step().state == "running"
        assert site.stage(GOOD).stage == number
    with restarted(site):
        site.step()
    site.step()
    assert site.stage(GOOD).state == "completed"


def test_two_servers_take_each_step_once(site: Site) -> None:
    site.registry.rollouts.start(NEW, PLAN, site.now)
    other = site.new_engine()
    for _ in range(4):
        site.step()
        other.step()
    stages = [
        each.details["stage"]
        for each in site.registry.audit_log.entries("rollout:1")
        if each.action == "rollout_stage"
    ]
    assert stages == [1]


def test_a_step_is_not_applied_before_its_period_is_over(site: Site) -> None:
    site.registry.rollouts.start(NEW, PLAN, site.now)
    site.engine = RolloutEngine(site.registry, lambda: site.now, period_s=10.0)
    site.engine.step()
    assert site.row().state == "running"
    assert site.step(9.0).stage == 0
    assert site.step(1.0).stage == 1


def test_bundles_list_their_workers_and_their_serving_and_desired_devices(site: Site) -> None:
    site.begin()
    rows = {row.bundle_id: row for row in site.registry.rollouts.bundles()}
    new = rows[NEW]
    old = rows[OLD]
    assert (new.devices, new.wanted, new.workers, new.rollout, new.rollout_state) == (
        0,
        1,
        ("worker-1",),
        1,
        "running",
    )
    assert (old.devices, old.wanted, old.rollout, old.rollout_state) == (10, 9, None, "")
    assert not site.registry.rollouts.add_bundle(NEW, "tiny", 1000)
    assert site.registry.rollouts.desired_bundles() == {OLD: 9, NEW: 1}


# The way back from a completed roll-out.


def completed(site: Site, plan: RolloutPlan = PLAN) -> RolloutRow:
    site.begin(plan)
    for _ in range(plan.num_stages):
        row = site.stage(GOOD)
    assert row.state == "completed"
    return row


def test_a_completed_roll_out_is_rolled_back_by_the_same_stages(site: Site) -> None:
    completed(site)
    assert site.registry.rollouts.roll_back(None, now=site.now) == 2
    site.step()
    row = site.step()
    assert (row.id, row.bundle_id, row.state, row.stage) == (2, OLD, "running", 1)
    assert row.plan == msgspec.to_builtins(PLAN)
    assert site.on(OLD) == ["d0"]
    for count in (2, 5, 10):
        site.stage(GOOD)
        assert len(site.on(OLD)) == count
    assert site.stage(GOOD).state == "completed"
    assert site.registry.desired_state.settings(Target(Scope.ALL)).bundle == OLD
    assert set(own_settings(site).values()) == {Settings()}


def test_the_way_back_at_once_neither_waits_nor_compares(site: Site) -> None:
    completed(site)
    assert site.registry.rollouts.roll_back(1, at_once=True, now=site.now) == 2
    site.step()
    assert site.step().stage == 1
    assert site.on(OLD) == DEVICES
    row = site.step()
    assert (row.state, row.reason) == ("completed", "at once")
    assert site.registry.desired_state.settings(Target(Scope.ALL)).bundle == OLD
    assert set(own_settings(site).values()) == {Settings()}
    site.take()
    assert site.registry.rollouts.roll_back(None, now=site.now) == 3
    assert (site.row().bundle_id, site.row().num_stages) == (NEW, RolloutPlan().num_stages)


def test_an_open_roll_out_is_undone_before_a_completed_one_is_rolled_back(site: Site) -> None:
    completed(site)
    site.registry.rollouts.start(OLD, PLAN, site.now)
    assert site.registry.rollouts.roll_back(None, now=site.now) == 2
    assert site.row().state == "undone"
    with pytest.raises(RolloutError, match="cannot undo roll-out 2, which is undone: it has ended"):
        site.registry.rollouts.roll_back(None, now=site.now)


def test_a_way_back_to_no_known_bundle_is_refused(site: Site) -> None:
    with pytest.raises(RolloutError, match="no roll-out is open"):
        site.registry.rollouts.roll_back(None, now=site.now)
    for device in DEVICES:
        site.publish(device, NEW)
    site.registry.desired_state.change_settings(Target(Scope.ALL), lambda _: Settings())
    completed(site)
    with pytest.raises(RolloutError, match="no device of roll-out 1 served another bundle before"):
        site.registry.rollouts.roll_back(None, now=site.now)


# Answers of one mode are compared with those of the same mode.


def test_answers_are_compared_with_earlier_ones_of_the_same_mode(site: Site) -> None:
    alone = {"sources": {"exit:8": 10}, "mode": "standalone", "bundle_id": OLD}
    earlier = {
        (device, f"{device}-{i}"): report(f"{device}-{i}", started_at=site.now - 60.0, **alone)
        for device in DEVICES
        for i in range(90)
    }
    site.registry.stats.record_reports(earlier)
    site.begin()
    site.take()
    site.step()
    site.answers(30, GOOD)
    findings = site.row().findings
    assert findings[0] == "fine: offload 20.0%, before 20.0%, limit 10.0% more"
    assert site.stage(GOOD).stage == 2


def test_a_bundle_that_is_worse_in_one_mode_is_undone(site: Site) -> None:
    site.begin()
    site.take()
    site.step()
    site.answers(30, BAD)
    site.answers(300, {"mode": "standalone", "sources": {"exit:8": 10}})
    row = site.step()
    assert row.state == "undone"
    assert row.reason.startswith("collaborative: offload 90.0%, before 20.0%")


def test_a_stage_waits_for_enough_answers_of_one_mode(site: Site) -> None:
    site.begin()
    site.take()
    site.step()
    for mode in ("collaborative", "standalone", "verified"):
        site.answers(19, GOOD | {"mode": mode})
    row = site.step(1000.0)
    assert (row.state, row.answers, row.doing) == ("running", 57, "19 of 20 answers")


# Removal.


def test_a_bundle_without_devices_is_removed_and_can_be_added_again(site: Site) -> None:
    rollouts = site.registry.rollouts
    rollouts.rename_bundle(NEW, "spring")
    assert rollouts.remove_bundle("spring") == NEW
    assert [row.bundle_id for row in rollouts.bundles()] == [OLD]
    with pytest.raises(RolloutError, match="unknown bundle 'b-new': there are b-old; add it"):
        rollouts.start(NEW, PLAN, site.now)
    (entry, *_) = site.registry.audit_log.entries(f"bundle:{NEW}")
    assert (entry.action, entry.details["name"]) == ("bundle_remove", "spring")
    rollouts.rename_bundle(OLD, "spring")  # the name is free
    assert rollouts.add_bundle(NEW, "tiny", 1000)
    assert rollouts.find_bundle(NEW) == NEW


@pytest.mark.parametrize("force", [False, True])
def test_a_bundle_that_is_needed_is_not_removed(site: Site, *, force: bool) -> None:
    def remove(bundle_id: str) -> None:
        site.registry.rollouts.remove_bundle(bundle_id, force=force)

    with pytest.raises(
        RolloutError,
        match=r"b-old is not removed: it is the desired bundle of all devices; .*; "
        r"10 devices \(d0, d1, d2 and 7 more\) serve it",
    ):
        remove(OLD)
    site.registry.desired_state.change_settings(Target(Scope.ALL), lambda _: Settings())
    with pytest.raises(RolloutError, match="10 devices"):
        remove(OLD)
    with pytest.raises(RolloutError, match="the fleet serves it by its configuration"):
        site.registry.rollouts.remove_bundle(NEW, own_bundle=NEW, force=force)
    site.registry.rollouts.start(NEW, PLAN, site.now)
    with pytest.raises(RolloutError, match="roll-out 1, which is waiting, needs it"):
        remove(NEW)


def test_a_device_that_is_offline_and_desires_another_bundle_needs_its_old_one_no_more(
    site: Site,
) -> None:
    for device in DEVICES[1:]:
        site.publish(device, NEW)
    site.publish("d0", "", online=False)
    site.registry.desired_state.change_settings(Target(Scope.ALL), lambda _: Settings(bundle=NEW))
    assert site.registry.rollouts.remove_bundle(OLD) == OLD


def test_a_bundle_that_a_completed_roll_out_could_go_back_to_is_removed_only_by_force(
    site: Site,
) -> None:
    completed(site)
    with pytest.raises(RolloutError, match=r"'fleet bundle rollback 1' goes back to it; --force"):
        site.registry.rollouts.remove_bundle(OLD)
    assert site.registry.rollouts.remove_bundle(OLD, force=True) == OLD
    with pytest.raises(RolloutError, match="unknown bundle 'b-old': there are b-new"):
        site.registry.rollouts.roll_back(None, now=site.now)
