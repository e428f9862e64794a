"""Events that fire triggers: rates, receivers, and bad events."""

from __future__ import annotations

import logging
import queue
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
from fleet.protocol.report import ConfigProblem, DeviceStatus, decode_status
from fleet.protocol.triggers import Trigger
from fleet.transport.in_memory import InMemoryBroker, InMemoryTransport
from tests.system.memory_fleet import APP, DEVICE, WAIT_S, memory_fleet


def trigger(name: str = "warm", **changes: Any) -> Trigger:
    return Trigger(
        name=name, **{"events": f"{APP}/warmth", "template": "It is {celsius} degrees."} | changes
    )


class TriggeredDevice:
    """Triggers of a device on the in-memory broker; a test decides when its requests end."""

    def __init__(self, device: InMemoryTransport, app: InMemoryTransport) -> None:
        self.now = 0.0
        self.prompts: list[tuple[str, str, PromptRequest]] = []
        self.active: set[tuple[str, str]] = set()
        self.problems: list[ConfigProblem] = []
        self.triggers = EventTriggers(
            device,
            epoch=7,
            on_prompt=self._on_prompt,
            is_active=lambda app, request: (app, request) in self.active,
            clock=lambda: self.now,
            on_problem=self.problems.append,
        )
        self._device = device
        self._app = app

    def _on_prompt(self, topic: str, payload: bytes) -> None:
        _, app, request = topics.parse_topic(topic, topics.PROMPT_FILTER)
        self.active.add((app, request))
        self.prompts.append((app, request, parse_prompt(payload)))

    def send(
        self, *payloads: bytes, topic: str = topics.app_event(APP, "warmth")
    ) -> list[str | None]:
        """Send events, and return the prompts that they become."""
        num_before = len(self.prompts)
        for payload in payloads:
            self._app.publish(topic, payload, qos=1)
        self._settle()
        return [prompt.prompt for _, _, prompt in self.prompts[num_before:]]

    def _settle(self) -> None:
        """Wait until the device's thread has handled all events."""
        done = threading.Event()
        self._device.subscribe("settled", lambda *_: done.set())
        self._app.publish("settled", b"")
        assert done.wait(WAIT_S)


@pytest.fixture
def triggered() -> Iterator[TriggeredDevice]:
    broker = InMemoryBroker()
    with broker.connect(DEVICE) as device, broker.connect(APP) as app:
        yield TriggeredDevice(device, app)


def test_an_event_becomes_a_prompt_of_its_app(triggered: TriggeredDevice) -> None:
    triggered.triggers.set([trigger(max_new_tokens=8)])
    triggered.send(b'{"celsius": 31}')
    assert triggered.prompts == [
        (APP, "warm-7-1", PromptRequest(prompt="It is 31 degrees.", max_new_tokens=8))
    ]


def test_the_response_can_go_to_another_app(triggered: TriggeredDevice) -> None:
    triggered.triggers.set([trigger(reply_to="display")])
    triggered.send(b'{"celsius": 31}')
    assert [app for app, _, _ in triggered.prompts] == ["display"]


def test_an_event_fires_every_trigger_that_listens_to_it_once(triggered: TriggeredDevice) -> None:
    triggered.triggers.set(
        [trigger(), trigger("any", events=f"{APP}/+", template="Something at {channel}.")]
    )
    assert triggered.send(b'{"celsius": 31}') == ["It is 31 degrees.", "Something at warmth."]
    assert triggered.send(b"open", topic=topics.app_event(APP, "door")) == ["Something at door."]


def test_the_same_event_twice_is_two_requests(triggered: TriggeredDevice) -> None:
    triggered.triggers.set([trigger()])
    triggered.send(b'{"celsius": 31}', b'{"celsius": 31}')
    assert len({request for _, request, _ in triggered.prompts}) == 2


def test_events_within_the_interval_are_dropped(triggered: TriggeredDevice) -> None:
    triggered.triggers.set([trigger(min_interval_s=60)])
    assert triggered.send(b'{"celsius": 31}', b'{"celsius": 32}') == ["It is 31 degrees."]
    triggered.now = 59.9
    assert triggered.send(b'{"celsius": 33}') == []
    triggered.now = 60.0
    assert triggered.send(b'{"celsius": 34}') == ["It is 34 degrees."]


def test_an_event_whose_condition_does_not_hold_uses_no_interval(
    triggered: TriggeredDevice,
) -> None:
    triggered.triggers.set([trigger(when="celsius > 30", min_interval_s=60)])
    assert triggered.send(b'{"celsius": 29}', b'{"celsius": 31}') == ["It is 31 degrees."]


def test_no_more_events_are_answered_at_once_than_allowed(
    triggered: TriggeredDevice, caplog: pytest.LogCaptureFixture
) -> None:
    triggered.triggers.set([trigger(max_in_flight=2)])
    assert len(triggered.send(*[b'{"celsius": 31}'] * 50)) == 2
    assert [record.message for record in caplog.records] == [
        "trigger warm drops an event: 2 are in flight"
    ]
    triggered.active.pop()
    assert len(triggered.send(*[b'{"celsius": 31}'] * 50)) == 1


def test_the_reason_of_a_dropped_event_is_passed_on_once_a_minute(
    triggered: TriggeredDevice,
) -> None:
    triggered.triggers.set([trigger(template="It is {celsius:.1f} degrees.")])
    assert triggered.send(b'{"celsius": "20.5"}') == ["It is 20.5 degrees."]
    assert triggered.send(b'{"celsius": "unavailable"}', b'{"celsius": null}', b"{") == []
    (problem,) = triggered.problems
    assert problem.message.startswith(f"trigger warm drops {APP}/warmth: expected a value")
    assert "'unavailable'" in problem.message
    assert not problem.is_final
    triggered.now += 60
    triggered.send(b"{")
    assert [each.code for each in triggered.problems] == ["bad_prompt", "undecodable"]


@pytest.mark.parametrize(
    "payload",
    [b"{", b"\xff", b'{"fahrenheit": 88}', b'{"celsius": "warm"}', b"31", b" ", b"x" * 20_000],
)
def test_a_bad_event_is_dropped_with_one_line_in_the_log(
    triggered: TriggeredDevice, payload: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    triggered.triggers.set([trigger(when="celsius > 30")])
    assert triggered.send(*[payload] * 50) == []
    (record,) = caplog.records
    assert "ce/v1/e/app-1/warmth" in record.message
    assert triggered.send(b'{"celsius": 31}') == ["It is 31 degrees."]


def test_a_trigger_that_cannot_use_an_event_leaves_it_to_the_others(
    triggered: TriggeredDevice,
) -> None:
    triggered.triggers.set([trigger("wants-more", template="{humidity}"), trigger()])
    assert triggered.send(b'{"celsius": 31}') == ["It is 31 degrees."]


def test_removed_triggers_receive_no_events(triggered: TriggeredDevice) -> None:
    triggered.triggers.set(
        [trigger(), trigger("door", events=f"{APP}/door", template="The door is {payload}.")]
    )
    triggered.triggers.set(
        [trigger("door", events=f"{APP}/door", template="The door is {payload}.")]
    )
    assert triggered.send(b'{"celsius": 31}') == []
    assert triggered.send(b"open", topic=topics.app_event(APP, "door")) == ["The door is open."]
    assert set(triggered._device._subscriptions) == {"ce/v1/e/app-1/door", "settled"}
    triggered.triggers.set([])
    assert triggered.send(b"open", topic=topics.app_event(APP, "door")) == []


def test_a_trigger_that_changes_keeps_its_rate(triggered: TriggeredDevice) -> None:
    triggered.triggers.set([trigger(min_interval_s=60)])
    triggered.send(b'{"celsius": 31}')
    triggered.triggers.set([trigger(min_interval_s=60, template="Warm: {celsius}")])
    assert triggered.send(b'{"celsius": 31}') == []
    triggered.now = 60.0
    assert triggered.send(b'{"celsius": 31}') == ["Warm: 31"]


def test_a_device_answers_an_event_and_streams_to_the_app(tiny_bundle: Bundle) -> None:
    config = AgentConfig(num_threads=1, triggers=(trigger(max_new_tokens=4, mode=Mode.STANDALONE),))
    with memory_fleet() as fleet:
        agent, _ = fleet.start_device(tiny_bundle, config)
        fleet.watcher.publish(topics.app_event(APP, "warmth"), b'{"celsius": 31}', qos=1)
        request = f"warm-{agent._epoch:x}-1"
        replies = [fleet.next_reply(request)]
        while not replies[-1].done:
            replies.append(fleet.next_reply(request))
        assert replies[-1].usage is not None
        assert replies[-1].usage.tokens == len(replies) - 1
        report = fleet.reports.get(timeout=WAIT_S)
        assert (report.app, report.request, report.mode) == (APP, request, "standalone")


def test_a_devices_status_has_the_reason_of_a_dropped_event_until_it_is_configured_again(
    tiny_bundle: Bundle,
) -> None:
    config = AgentConfig(num_threads=1, triggers=(trigger(),))
    statuses: queue.Queue[DeviceStatus] = queue.Queue()
    with memory_fleet() as fleet:
        agent, _ = fleet.start_device(tiny_bundle, config)
        fleet.watcher.subscribe(
            topics.device_status(DEVICE),
            lambda _, payload: statuses.put(decode_status(payload, DeviceStatus)),
            qos=1,
        )
        fleet.watcher.publish(topics.app_event(APP, "warmth"), b'{"humidity": 60}', qos=1)
        while (problem := statuses.get(timeout=WAIT_S).event_error) is None:
            pass  # the status before the event
        assert "expected a field 'celsius'" in problem.message
        agent.follow(config, 2)
        assert statuses.get(timeout=WAIT_S).event_error is None


def test_a_stopped_device_receives_no_events(tiny_bundle: Bundle) -> None:
    config = AgentConfig(num_threads=1, triggers=(trigger(),))
    with memory_fleet() as fleet:
        agent, transport = fleet.start_device(tiny_bundle, config)
        assert topics.app_event(APP, "warmth") in transport._subscriptions
        agent.__exit__(None, None, None)
        assert topics.app_event(APP, "warmth") not in transport._subscriptions


def test_a_device_with_a_flood_of_events_still_answers_its_apps(tiny_bundle: Bundle) -> None:
    config = AgentConfig(
        num_threads=1, max_queued_requests=8, triggers=(trigger(max_new_tokens=4),)
    )
    with memory_fleet() as fleet:
        fleet.start_device(tiny_bundle, config)
        for i in range(200):
            fleet.watcher.publish(topics.app_event(APP, "warmth"), b'{"celsius": %d}' % i, qos=1)
        answer = fleet.ask(PromptRequest(prompt="hello", max_new_tokens=4, mode=Mode.STANDALONE))
        assert answer.last.usage is not None


def test_a_bad_trigger_in_agent_json_is_named(tmp_path: Path) -> None:
    bad = {"triggers": [{"name": "warm", "events": "a/b", "template": "{0}"}]}
    (tmp_path / "agent.json").write_bytes(msgspec.json.encode(bad))
    with pytest.raises(
        ConfigError, match=r"agent.json.*: expected a field like \{room\}.*triggers"
    ):
        AgentConfig.load(tmp_path)
