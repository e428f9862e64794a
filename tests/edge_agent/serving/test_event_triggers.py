"""Events that pull triggers: how often, for whom, and what bad ones do not harm."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_agent.config import AgentConfig
from edge_agent.serving.event_triggers import EventTriggers
from fleet.bundles.manifest import Bundle
from fleet.errors import ConfigError
from fleet.protocol import topics
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import PromptRequest, parse_prompt
from fleet.protocol.triggers import Trigger
from fleet.transport.in_memory import InMemoryBroker, InMemoryTransport
from tests.system.memory_fleet import APP, DEVICE, WAIT_S, memory_fleet


def trigger(name: str = "warm", **changes: Any) -> Trigger:
    return Trigger(
        name=name, **{"events": f"{APP}/warmth", "template": "It is {celsius} degrees."} | changes
    )


class Site:
    """Triggers of a device on the in-memory broker, whose answers end when the test says so."""

    def __init__(self, device: InMemoryTransport, app: InMemoryTransport) -> None:
        self.now = 0.0
        self.asked: list[tuple[str, str, PromptRequest]] = []
        self.active: set[tuple[str, str]] = set()
        self.triggers = EventTriggers(
            device, 7, self._on_prompt, lambda *asked: asked in self.active, lambda: self.now
        )  # fmt: skip
        self._device = device
        self._app = app

    def _on_prompt(self, topic: str, payload: bytes) -> None:
        _, app, request = topics.parse(topic, "d", "+", "prompt", "+", "+")
        self.active.add((app, request))
        self.asked.append((app, request, parse_prompt(payload)))

    def say(self, *payloads: bytes, topic: str = topics.event(APP, "warmth")) -> list[str | None]:
        """The prompts that these events become."""
        before = len(self.asked)
        for payload in payloads:
            self._app.publish(topic, payload, qos=1)
        self._settle()
        return [prompt.prompt for _, _, prompt in self.asked[before:]]

    def _settle(self) -> None:
        """Waits until the device's thread has handled all that was sent."""
        done = threading.Event()
        self._device.subscribe("settled", lambda *_: done.set())
        self._app.publish("settled", b"")
        assert done.wait(WAIT_S)


@pytest.fixture
def site() -> Iterator[Site]:
    broker = InMemoryBroker()
    with broker.connect(DEVICE) as device, broker.connect(APP) as app:
        yield Site(device, app)


def test_an_event_becomes_a_prompt_of_its_app(site: Site) -> None:
    site.triggers.set([trigger(max_new_tokens=8)])
    site.say(b'{"celsius": 31}')
    assert site.asked == [
        (APP, "warm-7-1", PromptRequest(prompt="It is 31 degrees.", max_new_tokens=8))
    ]


def test_the_answer_can_go_to_another_app(site: Site) -> None:
    site.triggers.set([trigger(reply_to="display")])
    site.say(b'{"celsius": 31}')
    assert [app for app, _, _ in site.asked] == ["display"]


def test_an_event_pulls_every_trigger_that_takes_it_once(site: Site) -> None:
    site.triggers.set(
        [trigger(), trigger("any", events=f"{APP}/+", template="Something at {channel}.")]
    )
    assert site.say(b'{"celsius": 31}') == ["It is 31 degrees.", "Something at warmth."]
    assert site.say(b"open", topic=topics.event(APP, "door")) == ["Something at door."]


def test_the_same_event_twice_is_two_requests(site: Site) -> None:
    site.triggers.set([trigger()])
    site.say(b'{"celsius": 31}', b'{"celsius": 31}')
    assert len({request for _, request, _ in site.asked}) == 2


def test_events_within_the_interval_are_dropped(site: Site) -> None:
    site.triggers.set([trigger(min_interval_s=60)])
    assert site.say(b'{"celsius": 31}', b'{"celsius": 32}') == ["It is 31 degrees."]
    site.now = 59.9
    assert site.say(b'{"celsius": 33}') == []
    site.now = 60.0
    assert site.say(b'{"celsius": 34}') == ["It is 34 degrees."]


def test_an_event_whose_condition_does_not_hold_uses_no_interval(site: Site) -> None:
    site.triggers.set([trigger(when="celsius > 30", min_interval_s=60)])
    assert site.say(b'{"celsius": 29}', b'{"celsius": 31}') == ["It is 31 degrees."]


def test_no_more_events_are_answered_at_once_than_allowed(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.triggers.set([trigger(max_in_flight=2)])
    assert len(site.say(*[b'{"celsius": 31}'] * 50)) == 2
    assert [record.message for record in caplog.records] == [
        "trigger warm drops an event: 2 are being answered"
    ]
    site.active.pop()
    assert len(site.say(*[b'{"celsius": 31}'] * 50)) == 1


@pytest.mark.parametrize(
    "payload",
    [b"{", b"\xff", b'{"fahrenheit": 88}', b'{"celsius": "warm"}', b"31", b"", b"x" * 20_000],
)
def test_a_bad_event_is_dropped_with_one_line_and_harms_nothing(
    site: Site, payload: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    site.triggers.set([trigger(when="celsius > 30")])
    assert site.say(*[payload] * 50) == []
    (record,) = caplog.records
    assert "ce/v1/e/app-1/warmth" in record.message
    assert site.say(b'{"celsius": 31}') == ["It is 31 degrees."]


def test_a_trigger_that_cannot_use_an_event_leaves_it_to_the_others(site: Site) -> None:
    site.triggers.set([trigger("wants-more", template="{humidity}"), trigger()])
    assert site.say(b'{"celsius": 31}') == ["It is 31 degrees."]


def test_triggers_that_are_taken_away_hear_nothing_more(site: Site) -> None:
    site.triggers.set(
        [trigger(), trigger("door", events=f"{APP}/door", template="The door is {payload}.")]
    )
    site.triggers.set([trigger("door", events=f"{APP}/door", template="The door is {payload}.")])
    assert site.say(b'{"celsius": 31}') == []
    assert site.say(b"open", topic=topics.event(APP, "door")) == ["The door is open."]
    assert set(site._device._handlers) == {"ce/v1/e/app-1/door", "settled"}
    site.triggers.set([])
    assert site.say(b"open", topic=topics.event(APP, "door")) == []


def test_a_trigger_that_changes_keeps_its_rate(site: Site) -> None:
    site.triggers.set([trigger(min_interval_s=60)])
    site.say(b'{"celsius": 31}')
    site.triggers.set([trigger(min_interval_s=60, template="Warm: {celsius}")])
    assert site.say(b'{"celsius": 31}') == []
    site.now = 60.0
    assert site.say(b'{"celsius": 31}') == ["Warm: 31"]


def test_a_device_answers_an_event_and_streams_to_the_app(tiny_bundle: Bundle) -> None:
    config = AgentConfig(num_threads=1, triggers=(trigger(max_new_tokens=4, mode=Mode.STANDALONE),))
    with memory_fleet() as fleet:
        agent, _ = fleet.start_device(tiny_bundle, config)
        fleet.watcher.publish(topics.event(APP, "warmth"), b'{"celsius": 31}', qos=1)
        request = f"warm-{agent._epoch:x}-1"
        replies = [fleet.next_reply(request)]
        while not replies[-1].done:
            replies.append(fleet.next_reply(request))
        assert replies[-1].usage is not None
        assert replies[-1].usage.tokens == len(replies) - 1
        report = fleet.reports.get(timeout=WAIT_S)
        assert (report.app, report.request, report.mode) == (APP, request, "standalone")


def test_a_device_that_has_stopped_hears_no_events(tiny_bundle: Bundle) -> None:
    config = AgentConfig(num_threads=1, triggers=(trigger(),))
    with memory_fleet() as fleet:
        agent, transport = fleet.start_device(tiny_bundle, config)
        assert topics.event(APP, "warmth") in transport._handlers
        agent.__exit__(None, None, None)
        assert topics.event(APP, "warmth") not in transport._handlers


def test_a_device_with_a_flood_of_events_still_answers_its_apps(tiny_bundle: Bundle) -> None:
    config = AgentConfig(
        num_threads=1, max_queued_requests=8, triggers=(trigger(max_new_tokens=4),)
    )
    with memory_fleet() as fleet:
        fleet.start_device(tiny_bundle, config)
        for i in range(200):
            fleet.watcher.publish(topics.event(APP, "warmth"), b'{"celsius": %d}' % i, qos=1)
        answer = fleet.ask(PromptRequest(prompt="hello", max_new_tokens=4, mode=Mode.STANDALONE))
        assert answer.last.usage is not None


def test_a_bad_trigger_in_agent_json_is_named(tmp_path: Path) -> None:
    bad = {"triggers": [{"name": "warm", "events": "a/b", "template": "{0}"}]}
    (tmp_path / "agent.json").write_bytes(msgspec.json.encode(bad))
    with pytest.raises(ConfigError, match=r"agent.json: expected a field like \{room\}.*triggers"):
        AgentConfig.load(tmp_path)
