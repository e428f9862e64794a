"""Each kind of alarm fires by its cause, and resolves when the cause has ended."""

from __future__ import annotations

import pytest

from fleet.identity.enrolment import Enrolment
from fleet.protocol.desired_config import Settings
from fleet.protocol.types import DAY_S
from fleet.registry.alarms.alarm_kinds import AlarmKind
from fleet.registry.alarms.conditions import BundleFacts
from fleet.registry.alarms.rules import DEFAULT_RULES
from fleet.registry.results import IssuedCertificate
from fleet.registry.rollouts.plan import RolloutPlan
from fleet.registry.rollouts.states import RolloutEvent
from tests.fleet.registry.alarms.alarm_site import (
    BUNDLE,
    EVERYWHERE,
    HOUSE,
    KITCHEN,
    AlarmSite,
)

HOUR_S = 3600.0


def for_s(kind: AlarmKind) -> float:
    return DEFAULT_RULES[kind].for_s


def test_a_fleet_in_order_has_no_alarm(site: AlarmSite) -> None:
    site.answer("kitchen", 100)
    site.pass_s(2 * HOUR_S)
    assert site.firing() == []
    assert site.events() == []


@pytest.mark.parametrize(
    ("kind", "sources"),
    [
        (AlarmKind.OFFLOAD, {"cloud": 9, "exit": 1}),
        (AlarmKind.FALLBACK, {"fallback": 5, "exit": 5}),
    ],
)
def test_a_share_of_tokens_fires_and_resolves(
    site: AlarmSite, kind: AlarmKind, sources: dict[str, int]
) -> None:
    site.answer_with("kitchen", 20, **sources)
    site.answer_with("attic", 20, exit=9, cloud=1)
    site.pass_s(for_s(kind))
    assert site.firing() == []
    site.pass_s(15.0)
    assert site.firing() == [(kind, "kitchen")]
    (row,) = site.registry.alarms.open_alarms()
    assert row.value == max(share / 10 for name, share in sources.items() if name != "exit")
    assert row.threshold == DEFAULT_RULES[kind].threshold
    site.answer_with("kitchen", 200, exit=10)
    site.pass_s(15.0)
    assert site.firing() == []
    assert site.events() == [(kind, "kitchen", "firing"), (kind, "kitchen", "resolved")]


def test_a_share_of_few_tokens_is_none(site: AlarmSite) -> None:
    site.answer_with("kitchen", 19, cloud=10)
    site.pass_s(HOUR_S)
    assert site.firing() == []


def test_a_share_is_forgotten_after_two_hours(site: AlarmSite) -> None:
    site.answer_with("kitchen", 20, cloud=10)
    site.pass_s(HOUR_S)
    assert site.firing() == [("offload", "kitchen")]
    site.pass_s(2 * HOUR_S)
    assert site.firing() == []


def test_tokens_that_were_to_be_the_devices_own_are_no_fallbacks(site: AlarmSite) -> None:
    values = {"mode": "standalone", "tokens": 10, "sources": {"fallback": 10}}
    site.answer("kitchen", 30, **values)
    site.pass_s(HOUR_S)
    assert site.firing() == []


def test_errors_fire_and_resolve(site: AlarmSite) -> None:
    site.answer("kitchen", 2, finish_reason="error")
    site.answer("kitchen", 8)
    site.answer("attic", 2, finish_reason="error")
    site.pass_s(for_s(AlarmKind.ERRORS) + 15.0)
    assert site.firing() == [("errors", "kitchen")]
    site.answer("kitchen", 20)
    site.pass_s(15.0)
    assert site.firing() == []


def test_a_broken_promise_fires_and_resolves(site: AlarmSite) -> None:
    site.facts[BUNDLE] = BundleFacts(promise=0.95)
    site.answer("kitchen", 100, judged=10, agreed=8)
    site.answer("attic", 100, judged=10, agreed=10)
    site.pass_s(for_s(AlarmKind.AGREEMENT) + 15.0)
    assert site.firing() == [("agreement", "kitchen")]
    (row,) = site.registry.alarms.open_alarms()
    assert (row.value, row.threshold) == (0.8, 0.95)
    site.facts[BUNDLE] = BundleFacts()
    site.pass_s(15.0)
    assert site.firing() == []


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "verified"},
        {"bundle_id": "b-earlier"},
        {"judged": 1, "agreed": 0},
        {"agreed": 9, "answers": 2},
    ],
)
def test_a_promise_is_not_broken_by_other_answers_few_of_them_or_chance(
    site: AlarmSite, changes: dict[str, object]
) -> None:
    site.facts[BUNDLE] = BundleFacts(promise=0.91)
    site.answer("kitchen", 100, **{"judged": 10, "agreed": 8} | changes)
    site.pass_s(HOUR_S)
    assert site.firing() == []


@pytest.mark.parametrize("target", [EVERYWHERE, HOUSE, KITCHEN])
def test_a_promise_holds_for_the_thresholds_of_the_bundle_alone(
    site: AlarmSite, target: object
) -> None:
    site.facts[BUNDLE] = BundleFacts(promise=0.95)
    version = site.desire(target, Settings(threshold=0.5))  # type: ignore[arg-type]
    site.publish("kitchen", version=version)
    site.publish("attic", version=version if target is EVERYWHERE else 0)
    site.answer("kitchen", 100, judged=10, agreed=8)
    site.pass_s(for_s(AlarmKind.AGREEMENT) + 15.0)
    assert site.firing() == []
    site.set_rule(AlarmKind.AGREEMENT, threshold=0.9)
    site.pass_s(for_s(AlarmKind.AGREEMENT) + 15.0)
    assert site.firing() == [("agreement", "kitchen")]


def test_a_device_that_is_offline_fires_and_resolves(site: AlarmSite) -> None:
    site.publish("kitchen", online=False)
    site.pass_s(for_s(AlarmKind.OFFLINE))
    assert site.firing() == []
    site.pass_s(15.0)
    assert site.firing() == [("offline", "kitchen")]
    site.publish("kitchen")
    site.pass_s(15.0)
    assert site.firing() == []


def test_a_device_that_comes_back_in_between_is_not_offline_for_long(site: AlarmSite) -> None:
    for _ in range(5):
        site.publish("kitchen", online=False)
        site.pass_s(for_s(AlarmKind.OFFLINE) - 30.0)
        site.publish("kitchen")
        site.pass_s(15.0)
    assert site.firing() == []


def test_a_device_that_is_suspended_or_was_never_seen_is_not_offline(site: AlarmSite) -> None:
    site.registry.identities.enroll([Enrolment(name="newcomer")], 900.0)
    site.publish("kitchen", online=False)
    site.registry.identities.suspend("kitchen")
    site.pass_s(HOUR_S)
    assert site.firing() == []


def certified(name: str, begin: float, end: float) -> tuple[Enrolment, IssuedCertificate]:
    digest = f"{int(end):064x}"
    issued = IssuedCertificate(
        serial=digest[24:],
        fingerprint=digest,
        key_hash=digest,
        pem="",
        not_before=begin,
        not_after=end,
    )
    return Enrolment(name=name), issued


@pytest.mark.parametrize(("life_days", "left_days"), [(90.0, 7.0), (6.0, 1.0)])
def test_a_certificate_near_its_end_fires_until_it_is_renewed(
    site: AlarmSite, life_days: float, left_days: float
) -> None:
    margin_s = for_s(AlarmKind.CERTIFICATE) + 60.0
    end = site.now + left_days * DAY_S + margin_s
    begin = end - life_days * DAY_S
    site.registry.identities.add_certified([certified("cellar", begin, end)])
    site.pass_s(margin_s - 15.0)
    assert site.firing() == []
    site.pass_s(margin_s)
    assert site.firing() == [("certificate", "cellar")]
    site.registry.identities.add_certified(
        [certified("cellar", site.now, site.now + 90 * DAY_S)], replace=True
    )
    site.pass_s(15.0)
    assert site.firing() == []


def test_a_device_that_refuses_or_lags_fires_and_resolves(site: AlarmSite) -> None:
    version = site.desire(HOUSE, Settings(top_k=3))
    site.publish("attic", problem="no such\nthing\x1b[31m")
    site.pass_s(for_s(AlarmKind.CONFIG))
    assert site.firing() == []
    site.pass_s(15.0)
    assert site.firing() == [("config", "attic"), ("config", "kitchen")]
    texts = {row.subject: row.summary for row in site.registry.alarms.open_alarms()}
    assert texts["kitchen"] == f"kitchen has version 0 of its desired settings instead of {version}"
    assert "no such thing" in texts["attic"]
    assert texts["attic"].isprintable()
    site.publish("kitchen", version=version)
    site.publish("attic", online=False)  # an alarm of another kind then
    site.pass_s(15.0)
    assert site.firing() == []


@pytest.mark.parametrize("state", ["undone", "failed"])
def test_a_roll_out_that_was_stopped_fires_until_the_next_one(site: AlarmSite, state: str) -> None:
    rollout = site.registry.rollouts.start(BUNDLE, RolloutPlan(group="house"), site.now)
    site.pass_s(15.0)
    assert site.firing() == []
    site.end_rollout(rollout, state, "errors 20%, limit 5%")
    site.pass_s(15.0)
    assert site.firing() == [("rollout", f"rollout:{rollout}")]
    (row,) = site.registry.alarms.open_alarms()
    assert "errors 20%, limit 5%" in row.summary
    site.registry.rollouts.start(BUNDLE, RolloutPlan(), site.now)
    site.pass_s(15.0)
    assert site.firing() == []


def test_a_roll_out_that_an_operator_undid_is_no_alarm(site: AlarmSite) -> None:
    rollout = site.registry.rollouts.start(BUNDLE, RolloutPlan(), site.now)
    site.registry.rollouts.change(rollout, RolloutEvent.UNDO, site.now)
    site.pass_s(60.0)
    assert site.firing() == []


def test_a_roll_out_of_other_devices_does_not_resolve_the_alarm(site: AlarmSite) -> None:
    rollout = site.registry.rollouts.start(BUNDLE, RolloutPlan(group="house"), site.now)
    site.end_rollout(rollout, "failed", "no device")
    site.registry.identities.move("attic", "lab")
    site.registry.rollouts.start(BUNDLE, RolloutPlan(group="lab"), site.now)
    site.pass_s(15.0)
    assert site.firing() == [("rollout", f"rollout:{rollout}")]
    site.monotonic += 8 * DAY_S
    site.pass_s(15.0)
    assert site.firing() == []


def test_a_bundle_without_a_worker_fires_and_resolves(site: AlarmSite) -> None:
    site.work("b-other")
    site.pass_s(for_s(AlarmKind.WORKER) + 15.0)
    assert site.firing() == [("worker", f"bundle:{BUNDLE}")]
    site.work(BUNDLE)
    site.pass_s(15.0)
    assert site.firing() == []


def test_a_bundle_that_needs_no_worker_is_no_alarm(site: AlarmSite) -> None:
    site.work(BUNDLE, online=False)
    site.facts[BUNDLE] = BundleFacts(needs_worker=False)
    site.pass_s(HOUR_S)
    assert site.firing() == []
    site.facts.clear()
    for device in ("kitchen", "attic"):
        site.publish(device, mode="standalone")
    site.pass_s(HOUR_S)
    assert site.firing() == []


def test_a_bundle_that_the_fleet_does_not_offer_is_no_alarm(site: AlarmSite) -> None:
    site.publish("kitchen", bundle_id="<b>any text</b>")
    site.pass_s(HOUR_S)
    assert site.firing() == []


def test_a_worker_with_many_sessions_fires_and_resolves_where_there_is_a_limit(
    site: AlarmSite,
) -> None:
    site.work(BUNDLE, num_sessions=9)
    site.pass_s(HOUR_S)
    assert site.firing() == []
    site.set_rule(AlarmKind.WORKER, threshold=8.0)
    site.pass_s(for_s(AlarmKind.WORKER) + 15.0)
    assert site.firing() == [("worker", "worker-1")]
    site.work(BUNDLE, num_sessions=8)
    site.pass_s(15.0)
    assert site.firing() == []
