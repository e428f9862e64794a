"""A small fleet in a registry, and the evaluation of its alarms by a clock of tests."""

from __future__ import annotations

import itertools
from typing import Final

from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from fleet.protocol.access import Role
from fleet.protocol.desired_config import Settings
from fleet.protocol.report import ConfigProblem, DeviceStatus, WorkerStatus
from fleet.registry.alarms.alarm_kinds import AlarmKind
from fleet.registry.alarms.alarm_rows import AlarmEvent
from fleet.registry.alarms.conditions import BundleFacts
from fleet.registry.alarms.rules import AlarmRuleValues
from fleet.registry.database import parse_url
from fleet.registry.models import RolloutRecord
from fleet.registry.store import Registry
from fleet.registry.targets import Scope, Target
from fleet.server.alarm_evaluator import PERIOD_S, SETTLE_S, AlarmEvaluator
from fleet.transport.in_memory import InMemoryTransport
from tests.fleet.conftest import add, report

START: Final = 1_000_000_800.0  # 13 minutes and 20 s before the end of an hour
BUNDLE: Final = "b1"
EVERYWHERE: Final = Target(Scope.ALL)
KITCHEN: Final = Target(Scope.DEVICE, "kitchen")
HOUSE: Final = Target(Scope.GROUP, "house")


class AlarmSite:
    """kitchen of the group house, attic of no group, and a worker; all are online.

    `wall` is the wall clock less the monotonic clock; `facts` are those of each bundle.
    """

    def __init__(self, registry: Registry, url: str, link: InMemoryTransport) -> None:
        self.registry = registry
        self.url = url
        self.link = link
        self.monotonic = 1000.0
        self.wall = START - self.monotonic
        self.facts: dict[str, BundleFacts] = {}
        self._numbers = itertools.count()
        add(registry, "kitchen", group="house")
        add(registry, "attic")
        add(registry, "worker-1", Role.WORKER)
        registry.rollouts.add_bundle(BUNDLE, "tiny", 1000)
        self.publish("kitchen")
        self.publish("attic")
        self.work(BUNDLE)
        self.evaluator = self.new_evaluator()
        self.pass_s(SETTLE_S)

    @property
    def now(self) -> float:
        """The wall clock, in seconds since 1970."""
        return self.monotonic + self.wall

    def new_evaluator(self, registry: Registry | None = None) -> AlarmEvaluator:
        """An evaluator as of a server that starts now."""
        return AlarmEvaluator(
            registry or self.registry,
            lambda bundle_id: self.facts.get(bundle_id, BundleFacts()),
            self.link,
            lambda: self.now,
            lambda: self.monotonic,
        )

    def pass_s(self, span_s: float) -> None:
        """Let time pass, with an evaluation soon, some more, and one at the end."""
        end = self.monotonic + span_s
        step_s = PERIOD_S
        while self.monotonic < end:
            self.monotonic = min(end, self.monotonic + step_s)
            self.evaluator.step()
            step_s = max(PERIOD_S, span_s / 4)

    def publish(
        self,
        device: str,
        *,
        online: bool = True,
        mode: str = "auto",
        version: int = 0,
        problem: str | None = None,
        bundle_id: str = BUNDLE,
    ) -> None:
        """Store a status of a device."""
        status = DeviceStatus(
            online=online,
            epoch=1,
            bundle_id=bundle_id,
            mode=mode,
            config_version=version,
            config_error=ConfigProblem("bad", problem, is_final=True) if problem else None,
        )
        self.registry.stats.record_status(device, status, self.now)

    def work(self, *bundle_ids: str, online: bool = True, num_sessions: int = 0) -> None:
        """Store a status of the worker."""
        status = WorkerStatus(
            online=online, epoch=1, bundle_ids=bundle_ids, num_sessions=num_sessions
        )
        self.registry.stats.record_worker("worker-1", status, self.now)

    def answer(self, device: str, number: int = 1, **changes: object) -> None:
        """Store reports of answers that begin now."""
        reports = {}
        for _ in range(number):
            name = f"g{next(self._numbers)}"
            changes = {"bundle_id": BUNDLE, "started_at": self.now} | changes
            reports[device, name] = report(name, session=name, **changes)
        self.registry.stats.record_reports(reports)

    def answer_with(self, device: str, number: int, **sources: int) -> None:
        """Store reports of answers with these tokens by source; `exit` is exit 8."""
        names = {"exit": "exit:8"}
        by_source = {names.get(name, name): tokens for name, tokens in sources.items()}
        self.answer(device, number, sources=by_source, tokens=sum(sources.values()))

    def set_rule(self, kind: AlarmKind, target: Target = EVERYWHERE, **values: object) -> None:
        """Set values of a rule."""
        self.registry.alarms.set_rule(kind, target, AlarmRuleValues(**values))  # type: ignore[arg-type]

    def desire(self, target: Target, settings: Settings) -> int:
        """Change desired settings; return their version."""
        return self.registry.desired_state.change_settings(target, lambda _: settings)

    def end_rollout(self, rollout: int, state: str, reason: str) -> None:
        """Let the engine of roll-outs end one."""
        engine = create_engine(parse_url(self.url))
        with Session(engine) as db, db.begin():
            record = db.get_one(RolloutRecord, rollout)
            record.state = state
            record.reason = reason
            record.ended_at = self.now
        engine.dispose()

    def firing(self) -> list[tuple[str, str]]:
        """The kinds and subjects of the alarms that fire, in order."""
        return sorted((row.kind, row.subject) for row in self.registry.alarms.open_alarms())

    def events(self) -> list[tuple[str, str, str]]:
        """The kinds, subjects and states of all events, the oldest first."""
        return [(each.kind, each.subject, each.state) for each in self.all_events()]

    def all_events(self) -> list[AlarmEvent]:
        """All events, the oldest first."""
        return self.registry.alarms.events_after(0, 1000)
