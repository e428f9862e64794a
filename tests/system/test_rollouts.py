"""A bad and a good bundle, rolled out to ten devices by a server process over a real broker."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import msgspec
import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from fleet.identity.identity import Identity
from fleet.protocol import topics
from fleet.protocol.access import Role
from fleet.protocol.desired_config import Settings, decode_desired, encode_desired
from fleet.protocol.report import (
    ConfigProblem,
    DeviceStatus,
    WorkerStatus,
    encode_report,
    encode_status,
)
from fleet.registry.models import WorkerRecord
from fleet.registry.results import RolloutRow
from fleet.registry.rollouts.canary_analysis import CanaryLimits
from fleet.registry.rollouts.plan import RolloutPlan
from fleet.registry.targets import Scope, Target
from fleet.server.child_process import child
from fleet.server.home import WORKER, FleetConfig, FleetHome
from fleet.transport.base import Will
from fleet.transport.mqtt import MqttTransport
from tests.brokers import HOST, free_port, wait_until
from tests.fleet.conftest import report

OLD, GOOD, BAD, BROKEN = BUNDLES = ("b-old", "b-good", "b-bad", "b-broken")
SOURCES: Final = {
    OLD: {"cloud": 2, "exit:8": 8},
    GOOD: {"cloud": 1, "exit:8": 9},
    BAD: {"cloud": 9, "exit:8": 1},  # its exits are sure of nothing
}
DEVICES: Final = [f"d{i}" for i in range(10)]
PLAN: Final = RolloutPlan(
    percentages=(50, 100),
    observe_s=3.0,
    take_within_s=60.0,
    offline_after_s=30.0,
    limits=CanaryLimits(min_answers=20),
)
WAIT_S: Final = 90.0


class Device:
    """A device that installs every desired bundle but `BROKEN`, and reports by its bundle."""

    def __init__(self, identity: Identity, stack: ExitStack) -> None:
        self.name = identity.name
        self.bundle_id = OLD
        self._status = DeviceStatus(online=True, epoch=1, bundle_id=OLD)
        self._generations = itertools.count()
        will = Will(
            topics.device_status(self.name), encode_status(DeviceStatus(online=False, epoch=1))
        )
        self._link = stack.enter_context(MqttTransport.connect(identity, will=will))
        self._link.on_up(self._announce)
        self._link.subscribe(topics.device_config(self.name), self._on_config, qos=1)

    def answer(self) -> None:
        made = report(
            f"{self.name}-{next(self._generations)}",
            bundle_id=self.bundle_id,
            sources=SOURCES[self.bundle_id],
            started_at=time.time(),
        )
        self._link.publish(topics.device_stats(self.name), encode_report(made), qos=1)

    def _on_config(self, _: str, payload: bytes) -> None:
        desired = decode_desired(payload)
        wanted = desired.settings.bundle or OLD
        problem = None
        if wanted == BROKEN:
            problem = ConfigProblem("bad_bundle", "the graphs do not load", is_final=True)
        else:
            self.bundle_id = wanted
        self._status = DeviceStatus(
            online=True,
            epoch=1,
            bundle_id=self.bundle_id,
            config_version=desired.version,
            config_error=problem,
        )
        self._announce()

    def _announce(self) -> None:
        self._link.publish(
            topics.device_status(self.name), encode_status(self._status), qos=1, retain=True
        )


class Site:
    """A server, ten devices that answer all the time, and the publisher of their configuration."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.home = FleetHome.create(
            folder / "state",
            FleetConfig(host=HOST, port=free_port(), bundle=str(folder), service_port=0),
        )
        self.registry = stack.enter_context(self.home.registry())
        for bundle_id in BUNDLES:
            self.registry.rollouts.add_bundle(bundle_id, "tiny", 1000)
        self.registry.desired_state.change_settings(
            Target(Scope.ALL), lambda _: Settings(bundle=OLD)
        )
        self._serve_all()
        self.start_server(stack)
        worker = stack.enter_context(MqttTransport.connect(self.home.identity(WORKER, Role.WORKER)))
        birth = encode_status(WorkerStatus(online=True, epoch=1, bundle_ids=BUNDLES))
        worker.on_up(
            lambda: worker.publish(topics.worker_status(WORKER), birth, qos=1, retain=True)
        )
        self.devices = [
            Device(self.home.enroll(name, Role.DEVICE, folder / name), stack) for name in DEVICES
        ]
        self._operator = stack.enter_context(
            MqttTransport.connect(stack.enter_context(self.home.operator()))
        )
        self._stop = threading.Event()
        thread = threading.Thread(target=self._tell_and_answer)
        thread.start()
        stack.callback(thread.join)
        stack.callback(self._stop.set)

    def start_server(self, stack: ExitStack) -> None:
        self.server = stack.enter_context(
            child("the server", "fleet.cli", "server", "--home", str(self.home.folder))
        )
        self.server.wait_ready()

    def row(self) -> RolloutRow:
        return self.registry.rollouts.latest()[0]

    def serving(self) -> dict[str, int]:
        """Return the number of devices that serve each bundle."""
        served = [device.bundle_id for device in self.devices]
        return {bundle_id: served.count(bundle_id) for bundle_id in SOURCES if bundle_id in served}

    def said(self) -> dict[str, Settings]:
        return {
            name: self.registry.desired_state.settings(Target(Scope.DEVICE, name))
            for name in DEVICES
        }

    def until(self, state: str) -> RolloutRow:
        wait_until(
            lambda: self.row().state == state, f"the roll-out is {state}, not {self.row()}", WAIT_S
        )
        return self.row()

    def _serve_all(self) -> None:
        engine = create_engine(f"sqlite:///{self.home.folder / 'registry.sqlite'}")
        with Session(engine) as db, db.begin():
            db.add(
                WorkerRecord(
                    worker=WORKER,
                    online=True,
                    epoch=1,
                    bundle_ids=list(BUNDLES),
                    version="",
                    num_sessions=0,
                    draining=False,
                    last_seen=time.time(),
                )
            )
        engine.dispose()

    def _tell_and_answer(self) -> None:
        told: dict[str, int] = {}
        while not self._stop.wait(0.2):
            for name, config in self.registry.desired_state.configs().items():
                if told.get(name) != config.version:
                    self._operator.publish(
                        topics.device_config(name), encode_desired(config), qos=1, retain=True
                    )
                    told[name] = config.version
            for device in self.devices:
                device.answer()


@contextmanager
def running(folder: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(folder, stack)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with running(tmp_path) as made:
        yield made


def test_a_bad_bundle_stops_at_the_canary_and_a_good_one_comes_to_all(site: Site) -> None:
    wait_until(
        lambda: site.registry.stats.per_device()[0].generations > 20,
        "the old bundle has answered",
        WAIT_S,
    )
    site.registry.rollouts.start(BAD, PLAN)
    row = site.until("undone")
    assert (row.stage, row.num_told) == (1, 1)
    assert row.reason.startswith("offload ")
    wait_until(lambda: site.serving() == {OLD: 10}, "the old bundle is back", WAIT_S)
    assert set(site.said().values()) == {Settings()}

    site.registry.rollouts.start(GOOD, msgspec.structs.replace(PLAN, canary=2))
    row = site.until("completed")
    assert (row.stage, row.num_told) == (3, 10)
    wait_until(lambda: site.serving() == {GOOD: 10}, "all have the good bundle", WAIT_S)
    assert set(site.said().values()) == {Settings()}
    assert site.registry.desired_state.settings(Target(Scope.ALL)) == Settings(bundle=GOOD)


def test_one_that_a_device_cannot_load_is_undone_at_once(site: Site) -> None:
    site.registry.rollouts.start(BROKEN, PLAN)
    assert site.until("undone").reason == "d0 reports: the graphs do not load"
    assert site.serving() == {OLD: 10}


def test_a_roll_out_goes_on_when_the_server_is_started_again(site: Site) -> None:
    site.registry.rollouts.start(GOOD, PLAN)
    wait_until(lambda: site.row().stage == 2, "it is in the second stage", WAIT_S)
    site.server.stop()
    with ExitStack() as stack:
        site.start_server(stack)
        site.until("completed")
    assert site.registry.desired_state.settings(Target(Scope.ALL)) == Settings(bundle=GOOD)
