"""A fleet with one of each thing, and the API of operators over it."""

from __future__ import annotations

import shutil
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeAlias

from aiohttp import web

from fleet.errors import CredentialsError
from fleet.identity.enrolment import Enrolment
from fleet.operator_api.operation import OperatorRole, SignedInOperator
from fleet.operator_api.remote_access import RemoteAccess
from fleet.protocol.access import Role
from fleet.protocol.report import DeviceStatus, WorkerStatus
from fleet.registry.alarms.alarm_kinds import AlarmKind
from fleet.registry.alarms.rules import AlarmRuleValues
from fleet.registry.alarms.transitions import AlarmCondition, AlarmEvaluation
from fleet.registry.rollouts.plan import RolloutPlan
from fleet.registry.store import Registry
from fleet.registry.targets import Scope, Target
from fleet.server.console.api_errors import problem_response
from fleet.server.console.api_routes import OPERATOR, OperatorApi
from fleet.server.console.blocking_calls import BlockingCalls
from fleet.server.home import FleetConfig, FleetHome
from fleet.server.operations.context import OperationContext
from fleet.server.operations.local_access import LocalAccess
from fleet.transport.threaded_server import STOP_S, ThreadedServer
from tests.fleet.conftest import add, report

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]

BUNDLE: Final = "b" * 32
SPARE_BUNDLE: Final = "a" * 32
VERSION: Final = "9.9.9"
KEYS: Final = {role: f"fleet-operator-of-the-tests-{role}" for role in OperatorRole}
"""The key of an operator of each role, whose name is that of the role."""


def make_fleet(folder: Path) -> FleetHome:
    """Make a fleet with one of each thing that an operation shows or changes."""
    home = FleetHome.create(
        folder, FleetConfig(host="127.0.0.1", port=1, bundle="/no/bundle", service_port=8443)
    )
    (home.software / VERSION).mkdir(parents=True)
    with home.registry("tests") as registry:
        _fill(registry)
    return home


def _fill(registry: Registry) -> None:
    add(registry, "kitchen", group="house")
    add(registry, "attic", group="house")
    add(registry, "cellar", group="lab")
    add(registry, "phone", Role.APP, targets=("kitchen",))
    registry.identities.tag("kitchen", {"floor": "1"})
    registry.identities.enroll([Enrolment(name="newcomer")], 900.0)
    registry.api_keys.create("phone")
    registry.operators.add("ada", OperatorRole.VIEWER)
    registry.operators.create_key("ada", None)
    for number, device in enumerate(("kitchen", "attic")):
        status = DeviceStatus(online=True, epoch=1, bundle_id=BUNDLE, version="0.1.0", mode="auto")
        registry.stats.record_status(device, status, 1000.0 + number)
        for i in range(3):
            name = f"{device}-{i}"
            changes = {"session": name, "started_at": 1000.0 + i}
            registry.stats.record_report(device, report(name, **changes))
    now = time.time()
    registry.stats.record_report("kitchen", report("now", session="now", started_at=now))
    worker = WorkerStatus(online=True, epoch=1, bundle_ids=(BUNDLE,), version="0.1.0")
    registry.stats.record_worker("worker-1", worker, 1000.0)
    registry.rollouts.add_bundle(BUNDLE, "tiny", 1000)
    registry.rollouts.add_bundle(SPARE_BUNDLE, "tiny", 1000)
    registry.rollouts.start(BUNDLE, RolloutPlan(group="lab"))
    _fire_alarms(registry)


def _fire_alarms(registry: Registry) -> None:
    conditions = [
        AlarmCondition(kind=AlarmKind.OFFLINE, subject="attic", summary="attic is offline"),
        AlarmCondition(
            kind=AlarmKind.OFFLOAD,
            subject="kitchen",
            summary="90% of the tokens",
            value=0.9,
            threshold=0.8,
        ),
    ]
    found = {each.key: each for each in conditions}
    registry.alarms.apply(AlarmEvaluation(found, found), 2000.0)
    registry.alarms.apply(AlarmEvaluation({}, ()), 3000.0)
    del found[AlarmKind.OFFLOAD, "kitchen"]
    registry.alarms.apply(AlarmEvaluation(found, found), 4000.0)
    registry.alarms.set_rule(
        AlarmKind.OFFLINE, Target(Scope.GROUP, "house"), AlarmRuleValues(for_s=60.0)
    )


@contextmanager
def local_access(home: FleetHome) -> Iterator[LocalAccess]:
    """Access in this process."""
    with home.registry("admin") as registry:
        yield LocalAccess(OperationContext(registry, home))


@contextmanager
def serving(home: FleetHome, tls: ssl.SSLContext | None = None) -> Iterator[ApiOfTests]:
    """The API of a fleet, which accepts `KEYS`."""
    with (
        home.registry() as registry,
        ApiOfTests(OperationContext(registry, home), tls=tls) as server,
    ):
        yield server


class ApiOfTests(ThreadedServer):
    """The routes alone, on an address of this machine."""

    def __init__(
        self,
        context: OperationContext,
        calls: BlockingCalls | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__("API of operators", "127.0.0.1", 0)
        self._calls = calls or BlockingCalls()
        self._api = OperatorApi(context, self._calls)
        self._tls = tls

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def access(self, role: OperatorRole = OperatorRole.ADMIN) -> RemoteAccess:
        """Access with the key of an operator of this role."""
        return RemoteAccess(self.url, KEYS[role])

    async def _serve_on(self, listener: socket.socket) -> None:
        app = web.Application(middlewares=[authenticate])
        app.router.add_routes(self._api.routes())
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=STOP_S / 2)
        await runner.setup()
        await web.SockSite(runner, listener, ssl_context=self._tls).start()
        await self._until_stopped()
        await runner.cleanup()
        self._calls.close()


@web.middleware
async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
    key = request.headers.get("Authorization", "").removeprefix("Bearer ")
    roles = [role for role, each in KEYS.items() if each == key]
    if not roles:
        return problem_response(CredentialsError("expected a key of an operator"))
    request[OPERATOR] = SignedInOperator(roles[0].value, roles[0])
    try:
        return await handler(request)
    except web.HTTPException as error:
        return problem_response(error)


def copy_of(home: FleetHome, folder: Path) -> FleetHome:
    """Copy a fleet, so that it can be changed."""
    shutil.copytree(home.folder, folder)
    return FleetHome.load(folder)
