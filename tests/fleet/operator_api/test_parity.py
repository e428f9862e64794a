"""Each operation has the same response, and the same error, here and through the API."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import pytest

from fleet.errors import (
    AccessError,
    ConfigError,
    CredentialsError,
    FleetError,
    IdentityError,
    RolloutError,
    SoftwareError,
    StateError,
    TopicError,
    UnknownDeviceError,
    UnknownRolloutError,
)
from fleet.identity.enrolment import Enrolment
from fleet.operator_api import alarm_operations as alarms
from fleet.operator_api import audit_operations as audit
from fleet.operator_api import bundle_operations as bundles
from fleet.operator_api import device_operations as devices
from fleet.operator_api import identity_operations as identities
from fleet.operator_api import key_operations as keys
from fleet.operator_api import operator_operations as operators
from fleet.operator_api import settings_operations as settings
from fleet.operator_api import software_operations as software
from fleet.operator_api import stats_operations as stats
from fleet.operator_api.catalogue import OPERATIONS
from fleet.operator_api.fleet_access import FleetAccess
from fleet.operator_api.operation import NoFields, Operation, OperatorRole
from fleet.protocol.access import Role
from fleet.registry.alarms.alarm_kinds import AlarmKind
from fleet.registry.rollouts.plan import RolloutPlan
from fleet.server.home import FleetHome
from fleet.server.operations.local_access import HANDLERS
from tests.fleet.operator_api.api_fleet import (
    BUNDLE,
    SPARE_BUNDLE,
    VERSION,
    copy_of,
    local_access,
    make_fleet,
    serving,
)

RANDOM: Final = re.compile(r"[0-9.]+ GB free|[0-9a-f]{64}|\b(?!(?:a{16}|b{16}))[0-9a-f]{16}\b")
NEWEST_TIME: Final = 1_600_000_000.0  # times from here on are those of the test


class Case(NamedTuple):
    """An operation with a request, after others that prepare it."""

    operation: Operation[Any, Any]
    request: msgspec.Struct
    earlier: tuple[tuple[Operation[Any, Any], msgspec.Struct], ...] = ()


NEWCOMER: Final = identities.IdentityKey(name="newcomer")
KITCHEN: Final = identities.IdentityKey(name="kitchen")
HOUSE: Final = RolloutPlan(group="house", observe_s=5.0)
LAB_TAG: Final = ("floor=1", "lab")

CASES: Final = (
    Case(devices.LIST_DEVICES, devices.DeviceQuery()),
    Case(devices.LIST_DEVICES, devices.DeviceQuery(search="itch", online=True, tag="floor=1")),
    Case(devices.LIST_DEVICES, devices.DeviceQuery(after="attic", limit=1)),
    Case(devices.LIST_DEVICES, devices.DeviceQuery(sort="-last_seen", group="house")),
    Case(devices.SHOW_DEVICE, devices.DeviceWindow(device="kitchen", since=500.5)),
    Case(devices.MOVE_DEVICE, devices.GroupChange(device="kitchen", group="lab")),
    Case(devices.MOVE_DEVICE, devices.GroupChange(device="kitchen", group=None)),
    Case(
        devices.TAG_DEVICE,
        devices.TagChange(device="kitchen", tags={"room": "left"}, remove=("floor",)),
    ),
    Case(stats.LIST_DEVICE_STATS, stats.StatsWindow()),
    Case(stats.LIST_DEVICE_STATS, stats.StatsWindow(device="kitchen", since=1002.0)),
    Case(stats.LIST_GROUP_STATS, stats.StatsWindow(group="house", limit=1)),
    Case(stats.LIST_BUNDLE_STATS, stats.StatsWindow()),
    Case(stats.LIST_HOUR_STATS, stats.StatsWindow()),
    Case(stats.LIST_HOUR_STATS, stats.StatsWindow(since=0.0, limit=1)),
    Case(stats.LIST_SESSIONS, stats.SessionQuery(limit=2)),
    Case(stats.LIST_SESSIONS, stats.SessionQuery(device="attic", limit=2, after="1001.0_3")),
    Case(stats.LIST_WORKERS, NoFields()),
    Case(bundles.LIST_BUNDLES, NoFields()),
    Case(bundles.RENAME_BUNDLE, bundles.BundleNaming(bundle=BUNDLE, name="Summer.2026")),
    Case(bundles.REMOVE_BUNDLE, bundles.BundleRemoval(bundle=SPARE_BUNDLE, force=True)),
    Case(bundles.LIST_ROLLOUTS, bundles.RolloutQuery()),
    Case(bundles.LIST_ROLLOUTS, bundles.RolloutQuery(after="1")),
    Case(bundles.SHOW_ROLLOUT, bundles.RolloutKey(rollout=1)),
    Case(bundles.START_ROLLOUT, bundles.RolloutStart(bundle="bbbb", plan=HOUSE)),
    Case(bundles.PAUSE_ROLLOUT, bundles.RolloutChoice()),
    Case(
        bundles.RESUME_ROLLOUT,
        bundles.RolloutChoice(rollout=1),
        ((bundles.PAUSE_ROLLOUT, bundles.RolloutChoice(rollout=1)),),
    ),
    Case(bundles.ROLL_BACK, bundles.RolloutUndoing(at_once=True)),
    Case(
        settings.SHOW_SETTINGS,
        settings.SettingsTarget(target="device:kitchen"),
        (
            (
                settings.SET_SETTINGS,
                settings.SettingsChange(target="group:house", settings={"max_draft": 4}),
            ),
        ),
    ),
    Case(settings.SHOW_SETTINGS, settings.SettingsTarget(target="all")),
    Case(
        settings.SET_SETTINGS,
        settings.SettingsChange(
            target="device:kitchen", settings={"threshold": 0.5, "mode": "auto", "bundle": "bbbb"}
        ),
    ),
    Case(
        settings.UNSET_SETTINGS,
        settings.SettingsRemoval(target="all", keys=("threshold",)),
        (
            (
                settings.SET_SETTINGS,
                settings.SettingsChange(target="all", settings={"threshold": 0.5, "top_k": 3}),
            ),
        ),
    ),
    Case(
        settings.LIST_CONFIG_LAGS,
        settings.LagQuery(group="house", limit=1),
        (
            (
                settings.SET_SETTINGS,
                settings.SettingsChange(target="all", settings={"threshold": 0.5}),
            ),
        ),
    ),
    Case(software.LIST_VERSIONS, NoFields()),
    Case(software.LIST_UPDATES, software.UpdateQuery(limit=2)),
    Case(
        software.ROLL_OUT_VERSION,
        software.VersionRollout(version=VERSION, target="all", force=True),
    ),
    Case(identities.LIST_IDENTITIES, identities.IdentityQuery(role=Role.DEVICE, limit=2)),
    Case(identities.SHOW_IDENTITY, identities.IdentityKey(name="phone")),
    Case(
        identities.ENROLL,
        identities.EnrolmentOrder(
            enrolments=(
                Enrolment(name="tablet", group="house", tags={"floor": "2"}),
                Enrolment(name="clock", role=Role.APP, targets=("tablet",)),
            ),
            ttl_s=60.0,
        ),
    ),
    Case(identities.INVITE, identities.InvitationOrder(name="kitchen")),
    Case(identities.SUSPEND, KITCHEN),
    Case(identities.RESUME, KITCHEN, ((identities.SUSPEND, KITCHEN),)),
    Case(identities.REVOKE, KITCHEN),
    Case(identities.DELETE_IDENTITY, NEWCOMER),
    Case(identities.ALLOW, identities.TargetChange(name="phone", targets=LAB_TAG)),
    Case(identities.DISALLOW, identities.TargetChange(name="phone", targets=("kitchen",))),
    Case(identities.LIST_TOKENS, NoFields()),
    Case(keys.LIST_KEYS, keys.KeyQuery(app="phone")),
    Case(keys.CREATE_KEY, keys.KeyOrder(app="watch", allow=("kitchen",), life_s=60.0)),
    Case(keys.REVOKE_KEY, keys.KeyName(key_id="of the phone")),
    Case(audit.LIST_CHANGES, audit.AuditQuery(limit=3)),
    Case(audit.LIST_CHANGES, audit.AuditQuery(subject="phone", since=1.0, after="1000")),
    Case(audit.CHECK_FLEET, NoFields()),
    Case(alarms.LIST_ALARMS, alarms.AlarmQuery()),
    Case(alarms.LIST_ALARMS, alarms.AlarmQuery(state="all", limit=1)),
    Case(alarms.LIST_ALARMS, alarms.AlarmQuery(state="all", kind=AlarmKind.OFFLOAD, after="3")),
    Case(alarms.COUNT_ALARMS, NoFields()),
    Case(alarms.LIST_ALARM_EVENTS, alarms.AlarmEventQuery(subject="attic", limit=2)),
    Case(alarms.LIST_ALARM_EVENTS, alarms.AlarmEventQuery(kind=AlarmKind.OFFLOAD)),
    Case(alarms.ACKNOWLEDGE_ALARMS, alarms.Acknowledgement(alarms=(3,), note="on it")),
    Case(alarms.LIST_ALARM_RULES, alarms.AlarmRuleQuery()),
    Case(alarms.LIST_ALARM_RULES, alarms.AlarmRuleQuery(target="device:kitchen")),
    Case(
        alarms.SET_ALARM_RULE,
        alarms.AlarmRuleChange(
            target="group:house", kind=AlarmKind.OFFLOAD, threshold=0.5, for_s=60.0
        ),
    ),
    Case(
        alarms.UNSET_ALARM_RULE,
        alarms.AlarmRuleKey(target="group:house", kind=AlarmKind.OFFLINE),
    ),
    Case(alarms.MUTE_ALARMS, alarms.AlarmSilence(target="device:kitchen", for_s=60.0)),
    Case(
        alarms.MUTE_ALARMS,
        alarms.AlarmSilence(target="all", kind=AlarmKind.ERRORS, for_s=0.0),
    ),
    Case(operators.LIST_OPERATORS, NoFields()),
    Case(operators.ADD_OPERATOR, operators.NewOperator(name="eve", role=OperatorRole.VIEWER)),
    Case(
        operators.SET_OPERATOR_ROLE, operators.NewOperator(name="ada", role=OperatorRole.OPERATOR)
    ),
    Case(operators.REMOVE_OPERATOR, operators.OperatorName(name="ada")),
    Case(operators.MAKE_OPERATOR_LINK, operators.OperatorName(name="ada")),
    Case(operators.LIST_OPERATOR_KEYS, operators.OperatorKeyQuery(operator="ada")),
    Case(operators.CREATE_OPERATOR_KEY, operators.OperatorKeyOrder(name="ada", life_s=60.0)),
    Case(operators.REVOKE_OPERATOR_KEY, operators.OperatorKeyName(key_id="of ada")),
)

FAILURES: Final = (
    (UnknownDeviceError, devices.SHOW_DEVICE, devices.DeviceWindow(device="oven")),
    (UnknownDeviceError, stats.LIST_SESSIONS, stats.SessionQuery(device="oven")),
    (UnknownDeviceError, stats.LIST_GROUP_STATS, stats.StatsWindow(device="a/b c?d=e&f")),
    (UnknownDeviceError, identities.SUSPEND, identities.IdentityKey(name="oven")),
    (StateError, identities.RESUME, KITCHEN),
    (ConfigError, identities.REVOKE, identities.IdentityKey(name="collector")),
    (TopicError, devices.MOVE_DEVICE, devices.GroupChange(device="kitchen", group="A b")),
    (ConfigError, devices.TAG_DEVICE, devices.TagChange(device="kitchen")),
    (
        IdentityError,
        identities.ENROLL,
        identities.EnrolmentOrder(enrolments=(Enrolment(name="kitchen"),)),
    ),
    (CredentialsError, keys.REVOKE_KEY, keys.KeyName(key_id="0" * 16)),
    (ConfigError, operators.REMOVE_OPERATOR, operators.OperatorName(name="eve")),
    (
        ConfigError,
        operators.ADD_OPERATOR,
        operators.NewOperator(name="ada", role=OperatorRole.ADMIN),
    ),
    (IdentityError, keys.CREATE_KEY, keys.KeyOrder(app="watch")),
    (UnknownRolloutError, bundles.SHOW_ROLLOUT, bundles.RolloutKey(rollout=99)),
    (RolloutError, bundles.RESUME_ROLLOUT, bundles.RolloutChoice()),
    (RolloutError, bundles.START_ROLLOUT, bundles.RolloutStart(bundle="ffff")),
    (
        ConfigError,
        settings.SET_SETTINGS,
        settings.SettingsChange(target="all", settings={"threshold": 7}),
    ),
    (
        ConfigError,
        settings.SET_SETTINGS,
        settings.SettingsChange(target="all", settings={"num_threads": 1}),
    ),
    (
        ConfigError,
        settings.SET_SETTINGS,
        settings.SettingsChange(target="all", settings={"mode": None}),
    ),
    (
        ConfigError,
        settings.SET_SETTINGS,
        settings.SettingsChange(target="all", settings={"mode": "auto"}, if_version=7),
    ),
    (ConfigError, settings.SHOW_SETTINGS, settings.SettingsTarget(target="kitchen")),
    (
        ConfigError,
        settings.UNSET_SETTINGS,
        settings.SettingsRemoval(target="all", keys=("treshold",)),
    ),
    (ConfigError, settings.UNSET_SETTINGS, settings.SettingsRemoval(target="all", keys=())),
    (
        SoftwareError,
        software.ROLL_OUT_VERSION,
        software.VersionRollout(version=VERSION, target="all"),
    ),
    (
        SoftwareError,
        software.ROLL_OUT_VERSION,
        software.VersionRollout(version="1.0.0", target="all"),
    ),
    (ConfigError, audit.LIST_CHANGES, audit.AuditQuery(after="yesterday")),
    (ConfigError, alarms.LIST_ALARMS, alarms.AlarmQuery(after="yesterday")),
    (ConfigError, alarms.ACKNOWLEDGE_ALARMS, alarms.Acknowledgement(alarms=(2,))),
    (ConfigError, alarms.ACKNOWLEDGE_ALARMS, alarms.Acknowledgement(alarms=(3, 99))),
    (ConfigError, alarms.ACKNOWLEDGE_ALARMS, alarms.Acknowledgement(alarms=(1 << 53,))),
    (ConfigError, alarms.LIST_ALARM_RULES, alarms.AlarmRuleQuery(target="kitchen")),
    (
        ConfigError,
        alarms.SET_ALARM_RULE,
        alarms.AlarmRuleChange(target="all", kind=AlarmKind.OFFLOAD, threshold=7.0),
    ),
    (
        ConfigError,
        alarms.SET_ALARM_RULE,
        alarms.AlarmRuleChange(target="all", kind=AlarmKind.OFFLINE, threshold=0.5),
    ),
    (
        ConfigError,
        alarms.SET_ALARM_RULE,
        alarms.AlarmRuleChange(target="all", kind=AlarmKind.OFFLINE),
    ),
    (
        ConfigError,
        alarms.SET_ALARM_RULE,
        alarms.AlarmRuleChange(target="group:desert", kind=AlarmKind.OFFLINE, enabled=False),
    ),
    (
        UnknownDeviceError,
        alarms.MUTE_ALARMS,
        alarms.AlarmSilence(target="device:oven", for_s=60.0),
    ),
    (
        ConfigError,
        alarms.UNSET_ALARM_RULE,
        alarms.AlarmRuleKey(target="all", kind=AlarmKind.OFFLINE),
    ),
    (ConfigError, stats.LIST_SESSIONS, stats.SessionQuery(after="yesterday")),
)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> FleetHome:
    return make_fleet(tmp_path_factory.mktemp("fleet") / "template")


@pytest.fixture(scope="module")
def unchanged(template: FleetHome) -> Iterator[tuple[FleetAccess, FleetAccess]]:
    """Access here and through the API, to one fleet."""
    with local_access(template) as local, serving(template) as server, server.access() as remote:
        yield local, remote


def test_every_operation_is_tried_and_has_a_function() -> None:
    assert {case.operation for case in CASES} == set(OPERATIONS) == HANDLERS.keys()


@pytest.mark.parametrize(
    "case", CASES, ids=[f"{case.operation.method} {case.operation.path}" for case in CASES]
)
def test_an_operation_has_the_same_response_here_and_through_the_api(
    case: Case, template: FleetHome, tmp_path: Path
) -> None:
    here = copy_of(template, tmp_path / "here")
    there = copy_of(template, tmp_path / "there")
    with local_access(here) as access:
        expected = response_of(access, case)
    with serving(there) as server, server.access() as access:
        got = response_of(access, case)
    assert type(got) is type(expected) is case.operation.response
    assert steady(got, there) == steady(expected, here)
    assert changes(there) == changes(here)
    assert bool(changes(here)) == case.operation.is_change or case.earlier


def response_of(access: FleetAccess, case: Case) -> msgspec.Struct:
    """Run a case; the ids of keys are other ones in each run of the tests."""
    for operation, request in case.earlier:
        access.call(operation, request)
    request = case.request
    if isinstance(request, keys.KeyName):
        (row,) = access.call(keys.LIST_KEYS, keys.KeyQuery()).keys
        request = keys.KeyName(key_id=row.id)
    if isinstance(request, operators.OperatorKeyName):
        (own,) = access.call(operators.LIST_OPERATOR_KEYS, operators.OperatorKeyQuery()).keys
        request = operators.OperatorKeyName(key_id=own.id)
    response: msgspec.Struct = access.call(case.operation, request)
    return response


def steady(value: Any, home: FleetHome) -> Any:
    """Return a value without what differs between two fleets: random texts, and times."""
    match value:
        case msgspec.Struct():
            return steady(msgspec.to_builtins(value), home)
        case dict():
            return {key: steady(each, home) for key, each in value.items()}
        case list() | tuple():
            return [steady(each, home) for each in value]
        case str():
            return RANDOM.sub("random", value.replace(str(home.folder), "home"))
        case float() if value > NEWEST_TIME:
            return "a time"
    return value


def changes(home: FleetHome) -> Any:
    """Return the changes that the tests made, under the name of their operator."""
    with home.registry() as registry:
        rows = registry.audit_log.entries(limit=1000)
    return steady([row for row in rows if row.actor == "admin"], home)


@pytest.mark.parametrize(("error", "operation", "request_"), FAILURES)
def test_an_error_has_the_same_class_and_text_here_and_through_the_api(
    error: type[FleetError],
    operation: Operation[Any, Any],
    request_: msgspec.Struct,
    unchanged: tuple[FleetAccess, FleetAccess],
) -> None:
    texts = []
    for access in unchanged:
        with pytest.raises(error) as caught:
            access.call(operation, request_)
        assert type(caught.value) is error
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_the_second_of_two_operators_who_change_a_setting_learns_of_the_first(
    template: FleetHome, tmp_path: Path
) -> None:
    with (
        serving(copy_of(template, tmp_path / "fleet")) as server,
        server.access() as first,
        server.access(OperatorRole.OPERATOR) as second,
    ):
        version = second.call(settings.SHOW_SETTINGS, settings.SettingsTarget(target="all")).version
        values = {"top_k": 3}
        change = settings.SettingsChange(target="all", settings=values, if_version=version)
        first.call(settings.SET_SETTINGS, change)
        with pytest.raises(ConfigError, match="another operator has changed them"):
            second.call(settings.SET_SETTINGS, change)


def test_an_operation_needs_its_role(template: FleetHome, tmp_path: Path) -> None:
    """A role has the rights of those below it."""
    cases = {case.operation: case for case in reversed(CASES)}
    with serving(copy_of(template, tmp_path / "fleet")) as server:
        for role in OperatorRole:
            with server.access(role) as access:
                for operation, case in cases.items():
                    if not role.includes(operation.role):
                        with pytest.raises(AccessError, match=f"is {role}; .* {operation.role}"):
                            access.call(operation, case.request)
                    elif not operation.is_change and operation is not audit.CHECK_FLEET:
                        access.call(operation, case.request)
