"""Requests of several apps on one device: their shares, their ids, and replayed messages."""

from __future__ import annotations

import logging
import threading
from collections import Counter

import msgspec
import pytest

from edge_agent.config import AgentConfig
from fleet.bundles.manifest import Bundle
from fleet.errors import PromptError
from fleet.protocol import topics
from fleet.protocol.codec import encode
from fleet.protocol.messages import PROTOCOL, Open, Sampling
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import PromptRequest, Reply, decode_reply
from fleet.protocol.triggers import Trigger
from tests.system.memory_fleet import APP, DEVICE, WAIT_S, Answer, MemoryFleet, memory_fleet

ALONE = PromptRequest(
    prompt="How warm is it?", mode=Mode.STANDALONE, threshold=1.0, max_new_tokens=4
)
LONG = msgspec.structs.replace(ALONE, max_new_tokens=50, ignore_eos=True)
OTHER_APP = "app-2"
NO_TABLES = AgentConfig(num_threads=1, suffix_tables="off")
"""The apps share the model's chunks; a chunk of an app with more past texts gives more tokens."""
FLOOD = 20  # requests of the first app that wait for an answer or a refusal


def publish(
    fleet: MemoryFleet, request: str, prompt: PromptRequest | bytes, app: str = APP
) -> None:
    payload = prompt if isinstance(prompt, bytes) else msgspec.json.encode(prompt)
    fleet.watcher.publish(topics.device_prompt(DEVICE, app, request), payload, qos=1)


def read_answer(fleet: MemoryFleet, request: str) -> Answer:
    answer = Answer([fleet.next_reply(request)])
    while not answer.last.done:
        answer.replies.append(fleet.next_reply(request))
    return answer


def error_of(reply: Reply) -> str:
    assert reply.error is not None
    return f"{reply.error.code}: {reply.error.message}"


class Flood:
    """Two apps that always have so many requests at the device; it counts the tokens of each."""

    def __init__(self, fleet: MemoryFleet, num_requests: dict[str, int], num_wanted: int) -> None:
        self.tokens = Counter[str]()
        self.done = threading.Event()
        self._num_sent = 0
        self._num_wanted = num_wanted  # answers to the second app
        self._fleet = fleet
        fleet.watcher.subscribe(topics.device_reply(DEVICE, "+", "+"), self._on_reply, qos=1)
        for app, count in num_requests.items():
            for _ in range(count):
                self._send(app)

    def _send(self, app: str) -> None:
        self._num_sent += 1
        publish(self._fleet, f"r{self._num_sent}", LONG, app)

    def _on_reply(self, topic: str, payload: bytes) -> None:
        _, app, _ = topics.parse_topic(topic, topics.REPLY_FILTER)
        reply = decode_reply(payload)
        if reply.token_id is not None and OTHER_APP in {*self.tokens, app}:
            self.tokens[app] += 1  # from the second app's first token on
        if not reply.done or self.done.is_set():
            return
        if app == OTHER_APP and reply.usage:
            self._num_wanted -= 1
        if self._num_wanted:
            self._send(app)
        else:
            self.done.set()


@pytest.mark.parametrize("num_at_once", [1, 2])
def test_an_app_gets_its_share_of_a_device_that_another_app_floods(
    tiny_bundle: Bundle, num_at_once: int
) -> None:
    with memory_fleet() as fleet:
        fleet.start_device(tiny_bundle, NO_TABLES)
        flood = Flood(fleet, {APP: FLOOD, OTHER_APP: num_at_once}, num_wanted=8)
        assert flood.done.wait(2 * WAIT_S)
    assert flood.tokens[OTHER_APP] >= flood.tokens.total() / 3


def test_an_app_alone_may_fill_the_device_and_another_still_gets_in(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        agent, _ = fleet.start_device(
            tiny_bundle, AgentConfig(num_threads=1, max_queued_requests=4)
        )
        with agent._model_lock.of("test"):
            for i in range(5):
                publish(fleet, f"first-{i}", LONG)
            assert "busy: this device accepts 4 requests at once" in error_of(
                fleet.next_reply("first-4")
            )
            for i in range(3):
                publish(fleet, f"second-{i}", ALONE, OTHER_APP)
            assert "2 of them from app-2 now" in error_of(fleet.next_reply("second-2"))
        for request in ("second-0", "second-1", *(f"first-{i}" for i in range(4))):
            assert read_answer(fleet, request).last.usage


def test_a_device_that_apps_have_filled_still_accepts_an_operator(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        agent, _ = fleet.start_device(
            tiny_bundle, AgentConfig(num_threads=1, max_queued_requests=2)
        )
        with agent._model_lock.of("test"):
            for i, app in enumerate((APP, APP, OTHER_APP, "app-3")):
                publish(fleet, f"r{i}", ALONE, app)
            publish(fleet, "refused", ALONE, "app-4")
            assert "busy: this device accepts 2 requests" in error_of(fleet.next_reply("refused"))
            publish(fleet, "asked", ALONE, "operator-1")
        assert read_answer(fleet, "asked").last.usage


def test_another_prompt_with_the_id_of_an_answered_one_is_answered(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        fleet.start_device(tiny_bundle)
        publish(fleet, "ask", msgspec.structs.replace(ALONE, max_new_tokens=5000))
        assert "bad_prompt" in error_of(fleet.next_reply("ask"))
        publish(fleet, "ask", ALONE)
        first = read_answer(fleet, "ask")
        publish(fleet, "ask", msgspec.structs.replace(ALONE, prompt="How cold is it?"))
        second = read_answer(fleet, "ask")
        publish(fleet, "ask", msgspec.structs.replace(ALONE, prompt="How cold is it?"))
        again = read_answer(fleet, "ask")
    assert first.replies[0].generation != second.replies[0].generation
    assert second.replies == again.replies


def test_another_prompt_with_the_id_of_one_in_progress_is_refused(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        agent, _ = fleet.start_device(tiny_bundle)
        with agent._model_lock.of("test"):
            publish(fleet, "ask", ALONE)
            publish(fleet, "ask", msgspec.structs.replace(ALONE, prompt="How cold is it?"))
            error = error_of(fleet.next_reply("ask"))
        assert "bad_prompt: request id ask belongs to a different prompt" in error
        assert read_answer(fleet, "ask").last.usage


@pytest.mark.parametrize("request_id", ["R1", "ask.1", "a b", "x" * 64])
def test_a_request_id_that_is_not_allowed_is_answered_with_an_error(
    tiny_bundle: Bundle, request_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with memory_fleet() as fleet:
        fleet.start_device(tiny_bundle)
        for _ in range(50):
            publish(fleet, request_id, ALONE)
        for _ in range(50):
            assert "bad_prompt: request id" in error_of(fleet.next_reply(request_id))
    lines = [record for record in caplog.records if record.name.startswith("edge_agent")]
    assert len(lines) <= 1


def test_a_seed_that_is_left_out_is_fresh_and_reported(tiny_bundle: Bundle) -> None:
    hot = msgspec.structs.replace(ALONE, temperature=5.0, max_new_tokens=12, ignore_eos=True)
    with memory_fleet() as fleet:
        fleet.start_device(tiny_bundle)
        answers = [fleet.ask(hot) for _ in range(2)]
        seeds = [answer.last.usage.seed for answer in answers if answer.last.usage]
        again = fleet.ask(msgspec.structs.replace(hot, seed=seeds[0]))
    assert answers[0].token_ids == again.token_ids != answers[1].token_ids
    assert again.last.usage is not None
    assert again.last.usage.seed == seeds[0] != seeds[1]


def test_the_last_reply_holds_the_whole_text(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        fleet.start_device(tiny_bundle)
        answer = fleet.ask(LONG)
    assert answer.last.full_text == answer.text != ""
    assert not any(reply.full_text for reply in answer.replies[:-1])


def test_a_device_ignores_replayed_prompts_and_events(tiny_bundle: Bundle) -> None:
    trigger = Trigger(name="warm", events=f"{APP}/warmth", template="It is {payload}.")
    event = topics.app_event(APP, "warmth")
    prompt = topics.device_prompt(DEVICE, APP, "retained")
    with memory_fleet() as fleet:
        fleet.watcher.publish(prompt, msgspec.json.encode(ALONE), qos=1, retain=True)
        fleet.watcher.publish(event, b"31.2", qos=1, retain=True)
        config = AgentConfig(num_threads=1, triggers=(trigger,), max_new_tokens=2)
        _, link = fleet.start_device(tiny_bundle, config)
        link.drop()
        link.restore()
        for topic in (prompt, event):  # an empty message removes the retained one
            fleet.watcher.publish(topic, b"", qos=1, retain=True)
        publish(fleet, "live", ALONE)
        assert read_answer(fleet, "live").last.usage
        assert set(fleet._raw) == {"live"}
        assert fleet.reports.get(timeout=WAIT_S).request == "live"
        assert fleet.reports.empty()


def test_a_device_ignores_replayed_cancellations(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        fleet.watcher.publish(topics.device_cancel(DEVICE, APP, "ask"), b"", qos=1, retain=True)
        fleet.watcher.publish(topics.device_cancel(DEVICE, APP, "ask"), b"x", qos=1, retain=True)
        agent, link = fleet.start_device(tiny_bundle)
        with agent._model_lock.of("test"):
            publish(fleet, "ask", LONG)
            while not agent._active:
                threading.Event().wait(0.001)
            link.drop()
            link.restore()
        assert read_answer(fleet, "ask").last.finish_reason == "length"


def test_a_worker_ignores_replayed_messages_to_open_a_session(tiny_bundle: Bundle) -> None:
    opening = Open(
        session="old",
        epoch=1,
        bundle_id=tiny_bundle.manifest.bundle_id,
        protocol=PROTOCOL,
        sampling=Sampling(),
        max_positions=16,
        deadline_ms=1000,
    )
    with memory_fleet() as fleet:
        fleet.watcher.publish(topics.open_session(DEVICE), encode(opening), qos=1, retain=True)
        worker, _ = fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle)
        assert fleet.ask(msgspec.structs.replace(ALONE, mode=Mode.VERIFIED)).last.usage
        assert "old" not in {key.session for key in worker.engine.sessions}


def test_a_prompt_of_no_bytes_is_no_prompt(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        fleet.start_device(tiny_bundle)
        publish(fleet, "nothing", b"")
        with pytest.raises(PromptError, match="the prompt is empty"):
            fleet.ask(PromptRequest(prompt="\u200b"))
        assert set(fleet._raw) != {"nothing"}
