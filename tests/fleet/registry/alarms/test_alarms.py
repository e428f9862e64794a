"""States and events of alarms: durations, silences, acknowledgements, two servers, the outbox."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fleet.errors import ConfigError, RegistryError, UnknownDeviceError
from fleet.protocol.types import DAY_S
from fleet.registry.alarms.alarm_kinds import AlarmKind
from fleet.registry.alarms.alarm_rows import AlarmFilter, AlarmTotals
from fleet.registry.alarms.rules import AlarmRuleValues
from fleet.registry.store import Registry
from fleet.registry.targets import Scope, Target
from fleet.server.alarm_evaluator import SETTLE_S
from fleet.server.retention import Retention
from fleet.transport.in_memory import InMemoryBroker
from tests.brokers import WAIT_S, wait_until
from tests.fleet.conftest import add
from tests.fleet.registry.alarms.alarm_site import EVERYWHERE, HOUSE, KITCHEN, AlarmSite

HOUR_S = 3600.0
FIRED = ("offline", "kitchen", "firing")
RESOLVED = ("offline", "kitchen", "resolved")


@pytest.fixture
def prompt_site(site: AlarmSite) -> AlarmSite:
    """A site at which a device that is offline fires at once."""
    site.set_rule(AlarmKind.OFFLINE, for_s=0.0)
    return site


def lose(site: AlarmSite, device: str = "kitchen") -> int:
    """Let a device go offline, until its alarm fires; return the id of the alarm."""
    site.publish(device, online=False)
    site.pass_s(15.0)
    (row,) = site.registry.alarms.page(AlarmFilter(subject=device))
    return row.id


def test_the_narrowest_scope_decides_on_each_value(site: AlarmSite) -> None:
    site.set_rule(AlarmKind.OFFLINE, EVERYWHERE, for_s=60.0, enabled=False)
    site.set_rule(AlarmKind.OFFLINE, HOUSE, for_s=120.0)
    site.set_rule(AlarmKind.OFFLINE, KITCHEN, enabled=True)
    rules = site.registry.alarms.merged_rules(KITCHEN)
    assert (rules[AlarmKind.OFFLINE].enabled, rules[AlarmKind.OFFLINE].for_s) == (True, 120.0)
    for device in ("kitchen", "attic"):
        site.publish(device, online=False)
    site.pass_s(120.0)
    assert site.firing() == []
    site.pass_s(15.0)
    assert site.firing() == [("offline", "kitchen")]
    site.registry.alarms.delete_rule(AlarmKind.OFFLINE, KITCHEN)
    site.pass_s(15.0)
    assert site.firing() == []  # the rule for all has switched it off


def test_the_log_has_each_change_of_a_rule(site: AlarmSite) -> None:
    site.set_rule(AlarmKind.OFFLOAD, HOUSE, threshold=0.5)
    site.registry.alarms.mute([AlarmKind.OFFLOAD], HOUSE, 60.0)
    site.registry.alarms.delete_rule(AlarmKind.OFFLOAD, HOUSE)
    entries = site.registry.audit_log.entries(subject="group:house", limit=3)
    assert [entry.action for entry in entries] == ["alarm_rule_unset", "alarm_rule", "alarm_rule"]
    assert entries[2].details == {"kind": "offload", "threshold": 0.5}


@pytest.mark.parametrize(
    ("kind", "values", "reason"),
    [
        (AlarmKind.OFFLOAD, AlarmRuleValues(), "nothing to set"),
        (AlarmKind.OFFLOAD, AlarmRuleValues(threshold=1.5), "0 to 1"),
        (AlarmKind.OFFLOAD, AlarmRuleValues(threshold=float("nan")), "0 to 1"),
        (AlarmKind.OFFLOAD, AlarmRuleValues(threshold=-0.1), "0 to 1"),
        (AlarmKind.ROLLOUT, AlarmRuleValues(threshold=0.5), "rollout has no threshold"),
        (AlarmKind.WORKER, AlarmRuleValues(threshold=0.5), "1 to 1e"),
        (AlarmKind.OFFLINE, AlarmRuleValues(for_s=-1.0), "expected 0 to"),
        (AlarmKind.OFFLINE, AlarmRuleValues(for_s=31 * DAY_S), "expected 0 to"),
        (AlarmKind.OFFLINE, AlarmRuleValues(for_s=float("inf")), "expected 0 to"),
    ],
)
def test_a_rule_that_means_nothing_is_refused(
    site: AlarmSite, kind: AlarmKind, values: AlarmRuleValues, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        site.registry.alarms.set_rule(kind, EVERYWHERE, values)
    assert site.registry.alarms.rules().own == {}


def test_a_rule_needs_a_target_that_there_is(site: AlarmSite) -> None:
    alarms = site.registry.alarms
    with pytest.raises(UnknownDeviceError):
        site.set_rule(AlarmKind.OFFLINE, Target(Scope.DEVICE, "oven"), for_s=1.0)
    with pytest.raises(ConfigError, match="no device is in the group"):
        alarms.mute([AlarmKind.OFFLINE], Target(Scope.GROUP, "desert"), 60.0)
    with pytest.raises(ConfigError, match="worker has no rule for device:kitchen"):
        site.set_rule(AlarmKind.WORKER, KITCHEN, enabled=False)
    with pytest.raises(ConfigError, match="expected 0 to"):
        alarms.mute([AlarmKind.OFFLINE], EVERYWHERE, float("nan"))
    with pytest.raises(ConfigError, match="no rule of its own"):
        alarms.delete_rule(AlarmKind.OFFLINE, EVERYWHERE)
    assert alarms.rules().own == {}


def test_an_alarm_that_comes_back_is_a_new_one_and_both_are_in_the_history(
    prompt_site: AlarmSite,
) -> None:
    first = lose(prompt_site)
    prompt_site.publish("kitchen")
    prompt_site.pass_s(15.0)
    alarms = prompt_site.registry.alarms
    (resolved,) = alarms.page(AlarmFilter(state="resolved"))
    assert (resolved.id, resolved.resolved_at) == (first, prompt_site.now)
    second = lose(prompt_site)
    assert second > first
    assert [row.id for row in alarms.page(AlarmFilter(state="all"))] == [second]
    assert prompt_site.events() == [FIRED, RESOLVED, FIRED]
    assert [event.alarm for event in prompt_site.all_events()] == [first, first, second]


def test_an_acknowledgement_has_a_name_a_time_and_a_note(prompt_site: AlarmSite) -> None:
    alarm = lose(prompt_site)
    alarms = prompt_site.registry.acting_as("ada").alarms
    (row,) = alarms.acknowledge([alarm], "the plug")
    assert (row.acknowledged_by, row.note, row.state) == ("ada", "the plug", "firing")
    assert alarms.totals() == AlarmTotals(open=1, acknowledged=1, by_kind={"offline": 1})
    assert alarms.page(AlarmFilter(state="firing")) == []
    assert alarms.page(AlarmFilter(state="acknowledged")) == [row]
    event = prompt_site.all_events()[-1]
    assert (event.state, event.by, event.note, event.at) == (
        "acknowledged",
        "ada",
        "the plug",
        row.acknowledged_at,
    )
    (entry,) = prompt_site.registry.audit_log.entries("kitchen", action="alarm_acknowledge")
    assert entry.actor == "ada"
    prompt_site.pass_s(HOUR_S)
    assert alarms.page(AlarmFilter(state="acknowledged")) == [row]


def test_no_alarm_is_acknowledged_twice_or_when_it_has_resolved(prompt_site: AlarmSite) -> None:
    kitchen = lose(prompt_site)
    attic = lose(prompt_site, "attic")
    alarms = prompt_site.registry.alarms
    with pytest.raises(ConfigError, match="there is no alarm 99"):
        alarms.acknowledge([kitchen, 99])
    with pytest.raises(ConfigError, match="nothing to acknowledge"):
        alarms.acknowledge([])
    assert alarms.totals().acknowledged == 0
    alarms.acknowledge([kitchen, kitchen])
    with pytest.raises(ConfigError, match="was acknowledged by"):
        alarms.acknowledge([kitchen])
    prompt_site.publish("attic")
    prompt_site.pass_s(15.0)
    with pytest.raises(ConfigError, match="has resolved"):
        alarms.acknowledge([attic])


@pytest.mark.parametrize("note", ["a\nb\x00\x1b[31m", "x" * 100_000, "<b>&\u202e</b>"])
def test_a_note_is_one_printable_line_of_bounded_length(prompt_site: AlarmSite, note: str) -> None:
    (row,) = prompt_site.registry.alarms.acknowledge([lose(prompt_site)], note)
    assert row.note.isprintable()
    assert 0 < len(row.note) <= 1000
    assert prompt_site.all_events()[-1].note == row.note


def test_a_muted_alarm_is_in_the_list_and_its_event_comes_when_the_silence_ends(
    prompt_site: AlarmSite,
) -> None:
    prompt_site.set_rule(AlarmKind.OFFLINE, KITCHEN, muted_until=prompt_site.now + 600.0)
    lose(prompt_site)
    (row,) = prompt_site.registry.alarms.open_alarms()
    assert row.muted_until is not None
    assert prompt_site.events() == []
    prompt_site.pass_s(630.0)
    assert prompt_site.events() == [FIRED]
    (row,) = prompt_site.registry.alarms.open_alarms()
    assert row.muted_until is None


def test_an_alarm_that_resolves_in_silence_has_no_event(prompt_site: AlarmSite) -> None:
    prompt_site.set_rule(AlarmKind.OFFLINE, HOUSE, muted_until=prompt_site.now + 600.0)
    lose(prompt_site)
    prompt_site.publish("kitchen")
    prompt_site.pass_s(HOUR_S)
    assert prompt_site.events() == []


def test_an_alarm_that_was_told_of_before_its_silence_resolves_with_an_event(
    prompt_site: AlarmSite,
) -> None:
    lose(prompt_site)
    prompt_site.set_rule(AlarmKind.OFFLINE, muted_until=prompt_site.now + 600.0)
    prompt_site.pass_s(15.0)
    prompt_site.publish("kitchen")
    prompt_site.pass_s(15.0)
    assert prompt_site.events() == [FIRED, RESOLVED]


def test_an_alarm_resolves_when_its_rule_is_switched_off_or_its_device_deleted(
    prompt_site: AlarmSite,
) -> None:
    lose(prompt_site)
    lose(prompt_site, "attic")
    prompt_site.set_rule(AlarmKind.OFFLINE, KITCHEN, enabled=False)
    prompt_site.registry.identities.revoke("attic")
    prompt_site.registry.identities.delete("attic")
    prompt_site.pass_s(15.0)
    assert prompt_site.firing() == []


def test_while_the_link_is_down_alarms_stay_and_durations_begin_again(site: AlarmSite) -> None:
    site.publish("attic", online=False)
    site.pass_s(HOUR_S)
    site.publish("kitchen", online=False)
    site.pass_s(590.0)
    site.link.drop()
    site.publish("attic")
    site.pass_s(HOUR_S)
    assert site.firing() == [("offline", "attic")]
    is_up = threading.Event()
    site.link.on_up(is_up.set)  # after the evaluator's
    site.link.restore()
    assert is_up.wait(WAIT_S)
    site.pass_s(SETTLE_S - 1.0)
    assert site.firing() == [("offline", "attic")]
    site.pass_s(600.0)
    assert site.firing() == []
    site.pass_s(30.0)
    assert site.firing() == [("offline", "kitchen")]


def test_a_server_that_starts_again_neither_fires_nor_resolves_by_that(site: AlarmSite) -> None:
    site.publish("kitchen", online=False)
    site.pass_s(HOUR_S)
    site.publish("attic", online=False)
    site.evaluator = site.new_evaluator()
    site.publish("kitchen", online=False)
    site.pass_s(SETTLE_S)
    site.pass_s(590.0)
    assert site.events() == [FIRED]
    site.pass_s(30.0)
    assert site.firing() == [("offline", "attic"), ("offline", "kitchen")]


def test_after_a_registry_that_was_away_durations_begin_again(
    tmp_path: Path, ready_sqlite: Path
) -> None:
    path = Path(shutil.copy(ready_sqlite, tmp_path / "registry.sqlite"))
    with Registry.open(path) as registry, InMemoryBroker().connect("collector") as link:
        site = AlarmSite(registry, str(path), link)
        site.publish("kitchen", online=False)
        site.pass_s(590.0)
        away = path.rename(tmp_path / "away")
        with pytest.raises(RegistryError):
            site.pass_s(15.0)
        away.rename(path)
        site.pass_s(SETTLE_S)
        site.pass_s(590.0)
        assert site.firing() == []
        site.pass_s(30.0)
        assert site.firing() == [("offline", "kitchen")]


@pytest.mark.parametrize("jump_s", [-30 * DAY_S, -HOUR_S, 40.0, HOUR_S, 300 * DAY_S])
def test_a_jump_of_the_wall_clock_fires_nothing(site: AlarmSite, jump_s: float) -> None:
    site.publish("kitchen", online=False)
    site.pass_s(500.0)
    site.wall += jump_s
    site.pass_s(500.0)
    assert site.firing() == []


def test_two_servers_of_one_registry_do_nothing_twice(site: AlarmSite) -> None:
    site.set_rule(AlarmKind.OFFLINE, for_s=0.0)
    names = [f"d{number}" for number in range(30)]
    for name in names:
        add(site.registry, name)
        site.publish(name, online=False)
    with Registry.open(site.url) as other:
        evaluators = [site.evaluator, site.new_evaluator(other)]
        site.monotonic += SETTLE_S
        barrier = threading.Barrier(2)

        def step(number: int) -> None:
            barrier.wait(WAIT_S)
            evaluators[number].step()

        for online in (False, True):
            for name in names:
                site.publish(name, online=online)
            site.monotonic += 15.0
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(step, range(2)))
    assert sorted(site.events()) == sorted(
        ("offline", name, state) for name in names for state in ("firing", "resolved")
    )


def test_the_outbox_is_read_from_a_cursor_that_never_goes_back(prompt_site: AlarmSite) -> None:
    alarms = prompt_site.registry.alarms
    assert alarms.newest_event() == 0
    assert alarms.delivered("mail") is None
    lose(prompt_site)
    lose(prompt_site, "attic")
    first, second = alarms.events_after(0)
    assert alarms.events_after(0, limit=1) == [first]
    assert alarms.events_after(first.id) == [second]
    assert alarms.newest_event() == second.id
    alarms.set_delivered("mail", second.id)
    alarms.set_delivered("mail", first.id)
    assert alarms.delivered("mail") == second.id
    assert alarms.delivered("chat") is None


def test_numbers_of_events_are_not_used_again_after_old_ones_are_deleted(
    prompt_site: AlarmSite,
) -> None:
    alarms = prompt_site.registry.alarms
    alarm = lose(prompt_site)
    prompt_site.publish("kitchen")
    prompt_site.pass_s(15.0)
    newest = alarms.newest_event()
    assert alarms.delete_old(prompt_site.now + 1.0, limit=1) == 1
    assert alarms.delete_old(prompt_site.now + 1.0, limit=100) == 1
    assert alarms.events() == []
    assert alarms.page(AlarmFilter(state="all")) == []
    assert lose(prompt_site) > alarm
    assert alarms.newest_event() > newest


def test_retention_deletes_the_history(prompt_site: AlarmSite) -> None:
    lose(prompt_site)
    alarms = prompt_site.registry.alarms
    with Retention(prompt_site.registry, days=-1.0):
        wait_until(lambda: alarms.events() == [], "the events are deleted")


def test_old_alarms_that_fire_are_not_deleted(prompt_site: AlarmSite) -> None:
    lose(prompt_site)
    prompt_site.registry.alarms.delete_old(prompt_site.now + DAY_S, limit=100)
    assert prompt_site.firing() == [("offline", "kitchen")]


def test_lists_are_filtered_and_paged(prompt_site: AlarmSite) -> None:
    alarms = prompt_site.registry.alarms
    ids = [lose(prompt_site), lose(prompt_site, "attic")]
    assert [row.id for row in alarms.page(AlarmFilter(), limit=1)] == ids[1:]
    assert [row.id for row in alarms.page(AlarmFilter(), before=ids[1])] == ids[:1]
    assert alarms.page(AlarmFilter(kind=AlarmKind.OFFLOAD)) == []
    assert [event.alarm for event in alarms.events(AlarmKind.OFFLINE, "attic")] == ids[1:]
    newest, *_ = alarms.events(limit=1)
    assert [event.alarm for event in alarms.events(before=newest.id)] == ids[:1]
