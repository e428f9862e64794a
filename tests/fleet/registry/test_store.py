"""Reports, statuses, sessions and identities in the registry."""

from __future__ import annotations

import msgspec
import pytest

from fleet.errors import IdentityError, RegistryError, UnknownDeviceError
from fleet.protocol.access import Action, Grants, Role
from fleet.protocol.report import DeviceStatus
from fleet.registry.stats.repository import StatsRepository
from fleet.registry.store import Registry
from tests.fleet.conftest import add, report


def test_counts_of_several_generations_add_up(registry: Registry) -> None:
    add(registry, "edge-1")
    registry.stats.record_report("edge-1", report("g1"))
    registry.stats.record_report(
        "edge-1", report("g2", tokens=6, sources={"exit:8": 6, "cloud": 0})
    )
    (row,) = registry.stats.per_device(now=6 * 3600)
    assert msgspec.to_builtins(row) == {
        "device": "edge-1",
        "group": None,
        "online": False,
        "last_seen": None,
        "generations": 2,
        "errors": 0,
        "prompt_tokens": 14,
        "tokens": 16,
        "sources": {"exit:8": 11, "exit:15": 2, "cloud": 2, "fallback": 1},
        "shares": {"exit:8": 0.6875, "exit:15": 0.125, "cloud": 0.125, "fallback": 0.0625},
        "offload_rate": 0.125,
        "assists": 6,
        "verifies": 0,
        "drafted": 0,
        "judged": 0,
        "agreed": 0,
        "bytes_up": 4000,
        "bytes_down": 600,
        "ttft_p50_ms": pytest.approx(20.0, rel=0.2),
        "ttft_p95_ms": pytest.approx(20.0, rel=0.2),
        "tpot_p50_ms": pytest.approx(5.0, rel=0.2),
        "tpot_p95_ms": pytest.approx(5.0, rel=0.2),
        "switches": {},
        "trend": (0.125, None, None, None, None, None),
    }


def test_sources_come_in_the_order_of_depth(registry: Registry) -> None:
    add(registry, "edge-1")
    sources = {"fallback": 1, "exit:15": 1, "cloud": 1, "exit:4": 1, "exit:8": 1}
    registry.stats.record_report("edge-1", report(tokens=5, sources=sources))
    assert list(registry.stats.per_device()[0].sources) == [
        "exit:4",
        "exit:8",
        "exit:15",
        "cloud",
        "fallback",
    ]


def test_a_source_that_gave_no_token_is_not_listed(registry: Registry) -> None:
    add(registry, "edge-1")
    registry.stats.record_report("edge-1", report(tokens=1, sources={"exit:8": 1, "cloud": 0}))
    assert registry.stats.per_device()[0].sources == {"exit:8": 1}


def test_a_report_that_comes_twice_counts_once(registry: Registry) -> None:
    add(registry, "edge-1")
    assert registry.stats.record_report("edge-1", report())
    assert not registry.stats.record_report("edge-1", report())
    assert registry.stats.per_device()[0].generations == 1


def test_one_device_cannot_use_up_the_generation_ids_of_another(registry: Registry) -> None:
    add(registry, "edge-1")
    add(registry, "edge-2")
    assert registry.stats.record_report("edge-1", report())
    assert registry.stats.record_report("edge-2", report())
    assert [row.tokens for row in registry.stats.per_device()] == [10, 10]
    assert [row.device for row in registry.stats.sessions()] == ["edge-2", "edge-1"]


def test_a_report_that_does_not_add_up_is_refused(registry: Registry) -> None:
    add(registry, "edge-1")
    with pytest.raises(RegistryError, match="counts 11 tokens, but its sources add up to 10"):
        registry.stats.record_report("edge-1", report(tokens=11))


def test_since_leaves_out_earlier_generations(registry: Registry) -> None:
    add(registry, "edge-1")
    registry.stats.record_report("edge-1", report("g1", started_at=1000.0))
    registry.stats.record_report("edge-1", report("g2", started_at=2000.0))
    assert registry.stats.per_device(since=2000.0, now=3000.0)[0].generations == 1
    assert registry.stats.per_device(since=2000.0, now=3000.0)[0].sources["exit:8"] == 5
    assert registry.stats.per_device(since=2000.5, now=3000.0)[0].tokens == 0


def test_a_device_without_generations_has_a_row_of_zeros(registry: Registry) -> None:
    add(registry, "edge-1")
    (row,) = registry.stats.per_device("edge-1")
    assert (row.generations, row.tokens, row.sources, row.offload_rate) == (0, 0, {}, 0.0)


def test_stats_of_one_device_leave_out_the_others(registry: Registry) -> None:
    add(registry, "edge-1")
    add(registry, "edge-2")
    registry.stats.record_report("edge-1", report())
    (row,) = registry.stats.per_device("edge-2")
    assert (row.device, row.tokens) == ("edge-2", 0)


@pytest.mark.parametrize("ask", [StatsRepository.per_device, StatsRepository.sessions])
def test_an_unknown_device_is_named_with_the_known_ones_and_what_to_do(
    registry: Registry, ask: object
) -> None:
    add(registry, "edge-1")
    add(registry, "worker-1", Role.WORKER)
    with pytest.raises(
        UnknownDeviceError, match=r"unknown device 'oven': enrolled are edge-1; .*fleet enroll oven"
    ):
        ask(registry.stats, "oven")  # type: ignore[operator]


def test_reports_and_statuses_of_an_unknown_device_are_refused(registry: Registry) -> None:
    with pytest.raises(UnknownDeviceError):
        registry.stats.record_report("oven", report())
    with pytest.raises(UnknownDeviceError):
        registry.stats.record_status("oven", DeviceStatus(online=True, epoch=1), 1.0)


def test_an_apps_name_is_no_device(registry: Registry) -> None:
    add(registry, "app-1", Role.APP)
    assert registry.stats.devices() == []
    with pytest.raises(UnknownDeviceError):
        registry.stats.record_report("app-1", report())


def test_a_session_sums_its_generations(registry: Registry) -> None:
    add(registry, "edge-1")
    registry.stats.record_report("edge-1", report("g2", started_at=1001.0))
    registry.stats.record_report("edge-1", report("g1", started_at=1000.0))
    registry.stats.record_report("edge-1", report("g3", session=None, worker=None))
    (row,) = registry.stats.sessions("edge-1")
    assert (row.session, row.worker, row.opened_at, row.generations, row.tokens) == (
        "s1",
        "worker-1",
        1000.0,
        2,
        20,
    )


def test_sessions_are_the_latest_ones_newest_first(registry: Registry) -> None:
    add(registry, "edge-1")
    for i in range(4):
        registry.stats.record_report(
            "edge-1", report(f"g{i}", session=f"s{i}", started_at=1000.0 + i)
        )
    assert [row.session for row in registry.stats.sessions(limit=2)] == ["s3", "s2"]


def test_a_device_is_offline_until_it_publishes_a_status(registry: Registry) -> None:
    add(registry, "edge-1", group="kitchen")
    (row,) = registry.stats.devices()
    assert (row.device, row.group, row.online, row.last_seen) == ("edge-1", "kitchen", False, None)


def test_a_last_will_marks_a_device_offline_and_keeps_its_status(registry: Registry) -> None:
    add(registry, "edge-1")
    registry.stats.record_status(
        "edge-1",
        DeviceStatus(online=True, epoch=5, bundle_id="b1", version="0.1.0", mode="collaborative"),
        10.0,
    )
    registry.stats.record_status("edge-1", DeviceStatus(online=False, epoch=0), 20.0)
    (row,) = registry.stats.devices()
    assert (row.online, row.bundle_id, row.mode, row.last_seen) == (
        False,
        "b1",
        "collaborative",
        20.0,
    )


def test_a_repeated_last_will_does_not_change_when_a_device_was_last_seen(
    registry: Registry,
) -> None:
    add(registry, "edge-1")
    registry.stats.record_status("edge-1", DeviceStatus(online=True, epoch=5), 10.0)
    registry.stats.record_status("edge-1", DeviceStatus(online=False, epoch=0), 20.0)
    registry.stats.record_status("edge-1", DeviceStatus(online=False, epoch=0), 30.0)
    assert registry.stats.devices()[0].last_seen == 20.0


def test_a_name_is_enrolled_once(registry: Registry) -> None:
    add(registry, "edge-1")
    with pytest.raises(IdentityError, match="'edge-1' is enrolled already, as device"):
        add(registry, "edge-1", Role.APP)


def test_a_name_can_be_replaced_on_purpose(registry: Registry) -> None:
    add(registry, "edge-1")
    add(registry, "phone", Role.APP, targets=("edge-1",))
    registry.identities.add_identity(
        "phone", Role.WORKER, fingerprint="1" * 64, not_after=3e9, replace=True
    )
    phone = registry.identities.all()[1]
    assert (phone.role, phone.targets, phone.fingerprint, phone.not_after) == (
        "worker",
        (),
        "1" * 64,
        3e9,
    )


def test_identities_can_be_listed_by_role(registry: Registry) -> None:
    add(registry, "edge-1")
    add(registry, "phone", Role.APP, targets=("edge-1",))
    (phone,) = registry.identities.all(Role.APP)
    assert (phone.name, phone.targets) == ("phone", ("edge-1",))


def test_an_app_is_granted_the_devices_of_a_group_also_later_ones(registry: Registry) -> None:
    add(registry, "edge-1", group="kitchen")
    add(registry, "edge-2")
    add(registry, "phone", Role.APP, targets=("kitchen",))
    assert registry.identities.grants("phone") == Grants(Role.APP, "phone", ("edge-1",))
    add(registry, "edge-3", group="kitchen")
    grants = registry.identities.grants("phone")
    assert grants == Grants(Role.APP, "phone", ("edge-1", "edge-3"))
    assert grants.permits(Action.PUBLISH, "ce/v1/d/edge-3/prompt/phone/r1")
    assert not grants.permits(Action.PUBLISH, "ce/v1/d/edge-2/prompt/phone/r1")


def test_an_unknown_name_has_no_grants(registry: Registry) -> None:
    assert registry.identities.grants("stranger") is None


def test_a_target_that_is_neither_device_nor_group_is_refused(registry: Registry) -> None:
    add(registry, "worker-1", Role.WORKER)
    for target in ("attic", "worker-1"):
        with pytest.raises(IdentityError, match=f"cannot allow '{target}'"):
            add(registry, "phone", Role.APP, targets=(target,))
    assert registry.identities.grants("phone") is None


def test_a_name_is_never_both_a_groups_and_an_identitys(registry: Registry) -> None:
    add(registry, "edge-1", group="kitchen")
    with pytest.raises(IdentityError, match="'kitchen' is the name of a group"):
        add(registry, "kitchen")
    with pytest.raises(IdentityError, match="group 'edge-1' is the name of an identity"):
        add(registry, "edge-2", group="edge-1")
