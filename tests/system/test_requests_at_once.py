"""Several requests on one device share its weights, not caches, and none blocks another."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from edge_agent.config import AgentConfig
from edge_agent.serving.agent import Agent
from fleet.bundles.manifest import Bundle
from fleet.errors import PromptError
from fleet.graphs.cascade import Cascade
from fleet.protocol import topics
from fleet.protocol.codec import decode_to_worker
from fleet.protocol.messages import Open
from fleet.protocol.modes import CLOUD, Mode
from fleet.protocol.prompt import PromptRequest, decode_reply
from fleet.protocol.report import WorkerStatus, encode_status
from fleet.transport.base import MAX_QUEUED
from onnx_export.bundle import export_bundle
from onnx_export.config import ExportConfig
from tests.brokers import Inbox, running_site
from tests.system.memory_fleet import APP, DEVICE, WAIT_S, WORKER, Answer, MemoryFleet, memory_fleet
from tests.tiny import make_tiny_checkpoint, make_tiny_heads

PROMPTS = ("Tell me about the sea.", "What is a mountain?")
ALONE = PromptRequest(prompt=PROMPTS[0], mode=Mode.STANDALONE, threshold=0.0)
SOME_EXIT = (0.08, 1.0)  # at the first exit; the others go to the cloud
LONG = 8_000
TURNS_OF_A_TOKEN = 2  # a block, then the LM head


@pytest.fixture(scope="module")
def long_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny model with 8,192 positions and wide heads: caches of tens of megabytes."""
    folder = tmp_path_factory.mktemp("long")
    checkpoint = make_tiny_checkpoint(
        folder / "checkpoint", max_position_embeddings=8192, head_dim=128
    )
    heads = make_tiny_heads(folder / "heads", checkpoint, (1, 2))
    export_bundle(
        ExportConfig(out=folder / "bundle", exits=(1, 2), model=str(checkpoint), heads=heads)
    )
    return Bundle.load(folder / "bundle")


def ask_in_background(fleet: MemoryFleet, request: str, prompt: PromptRequest) -> None:
    """Publishes a prompt; the replies are read with `finish` or `fleet.next_reply`."""
    fleet.watcher.publish(
        topics.device_prompt(DEVICE, APP, request), msgspec.json.encode(prompt), qos=1
    )


def cancel(fleet: MemoryFleet, request: str) -> None:
    fleet.watcher.publish(topics.device_cancel(DEVICE, APP, request), b"", qos=1)


def finish(fleet: MemoryFleet, request: str) -> Answer:
    """The answer to a request, from the replies that were not read yet to the last one."""
    answer = Answer([fleet.next_reply(request)])
    while not answer.last.done:
        answer.replies.append(fleet.next_reply(request))
    return answer


def wait_until(condition: Callable[[], bool]) -> None:
    """Waits for another thread to come to a state; the test fails when it does not."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def most_positions(agent: Agent) -> int:
    """The positions of one answer that take the whole memory."""
    partition = agent._planner.partition
    fixed_bytes = Cascade.num_bytes(partition, 0)
    position_bytes = Cascade.num_bytes(partition, 1) - fixed_bytes
    return (agent._jobs.budget_bytes - fixed_bytes) // position_bytes


def both_waiting(agent: Agent) -> Callable[[], bool]:
    return lambda: agent._model_lock.num_waiting == 2


@pytest.mark.parametrize("mode", [Mode.STANDALONE, Mode.COLLABORATIVE, Mode.VERIFIED])
def test_two_requests_take_turns_and_each_gets_the_answer_that_it_gets_alone(
    tiny_bundle: Bundle, mode: Mode
) -> None:
    prompts = [
        PromptRequest(
            prompt=text,
            mode=mode,
            thresholds=SOME_EXIT,
            temperature=1.0,
            seed=seed,
            max_new_tokens=100,
        )
        for seed, text in enumerate(PROMPTS)
    ]
    with memory_fleet() as fleet:
        fleet.start_worker(tiny_bundle)
        agent, _ = fleet.start_device(tiny_bundle)
        alone = [fleet.ask(prompt).token_ids for prompt in prompts]
        with agent._model_lock.of(APP):  # no step can run: both begin together
            for prompt in prompts:
                ask_in_background(fleet, str(prompt.seed), prompt)
            wait_until(both_waiting(agent))
        first, second = (finish(fleet, str(prompt.seed)) for prompt in prompts)
    assert [first.token_ids, second.token_ids] == alone
    assert alone[0] != alone[1]
    for answer in (first, second):
        assert [reply.seq for reply in answer.replies] == list(range(len(answer.replies)))
        assert (CLOUD in answer.sources) == (mode is not Mode.STANDALONE)


def test_two_requests_are_under_way_at_the_same_time(tiny_bundle: Bundle) -> None:
    prompt = msgspec.structs.replace(ALONE, max_new_tokens=300, temperature=2.0, seed=0)
    with memory_fleet() as fleet:
        agent, _ = fleet.start_device(tiny_bundle)
        with agent._model_lock.of(APP):
            for request in ("a", "b"):
                ask_in_background(fleet, request, prompt)
            wait_until(both_waiting(agent))
        for _ in range(TURNS_OF_A_TOKEN):
            with agent._model_lock.of(APP):  # after those who waited: each has had one turn
                wait_until(both_waiting(agent))  # and both want another
        begun = [fleet.next_reply(request) for request in ("a", "b")]
        for request in ("a", "b"):
            cancel(fleet, request)
            finish(fleet, request)
    assert [reply.seq for reply in begun] == [0, 0]
    assert not any(reply.done for reply in begun)


def test_a_request_whose_worker_never_answers_blocks_no_other(tiny_bundle: Bundle) -> None:
    opened: queue.Queue[Open] = queue.Queue()

    def on_open(_: str, payload: bytes) -> None:
        message = decode_to_worker(payload)
        assert isinstance(message, Open)
        opened.put(message)

    with memory_fleet() as fleet:
        fleet.watcher.subscribe(topics.OPEN_FILTER, on_open)
        status = WorkerStatus(online=True, epoch=1, bundle_ids=(tiny_bundle.manifest.bundle_id,))
        fleet.watcher.publish(
            topics.worker_status(WORKER), encode_status(status), qos=1, retain=True
        )
        fleet.start_device(tiny_bundle, AgentConfig(num_threads=1, assist_deadline_ms=600_000))
        ask_in_background(
            fleet, "stuck", PromptRequest(prompt=PROMPTS[0], threshold=1.0, max_new_tokens=8)
        )
        opened.get(timeout=WAIT_S)
        assert len(fleet.ask(msgspec.structs.replace(ALONE, max_new_tokens=8)).token_ids) > 0
        assert fleet._raw.get("stuck", queue.Queue()).empty()
        cancel(fleet, "stuck")
        answer = finish(fleet, "stuck")
    assert answer.last.finish_reason == "cancelled"
    assert answer.last.note == "the request was cancelled"


def test_twenty_requests_on_four_slots_are_all_answered(tiny_bundle: Bundle) -> None:
    prompts = {
        f"r{i}": PromptRequest(prompt=f"Tell me {i}.", thresholds=SOME_EXIT, max_new_tokens=6)
        for i in range(20)
    }
    with memory_fleet() as fleet:
        fleet.start_worker(tiny_bundle)
        agent, _ = fleet.start_device(
            tiny_bundle, AgentConfig(num_threads=1, max_queued_requests=20)
        )
        for request, prompt in prompts.items():
            ask_in_background(fleet, request, prompt)
        together = {request: finish(fleet, request) for request in prompts}
        reports = [fleet.reports.get(timeout=WAIT_S) for _ in prompts]
        wait_until(lambda: agent._jobs.free_bytes == agent._jobs.budget_bytes)
        alone = {request: fleet.ask(prompt).token_ids for request, prompt in prompts.items()}
    assert {request: answer.token_ids for request, answer in together.items()} == alone
    assert {report.request for report in reports} == set(prompts)


def test_a_request_waits_until_its_caches_fit_and_no_other_overtakes_it(
    long_bundle: Bundle,
) -> None:
    with memory_fleet() as fleet:
        agent, _ = fleet.start_device(
            long_bundle, AgentConfig(num_threads=1, cache_budget_mb=1, max_positions=8192)
        )
        most = most_positions(agent)
        large, small = (
            msgspec.structs.replace(ALONE, max_new_tokens=n) for n in (most * 2 // 3, 1)
        )
        with agent._model_lock.of(APP):
            ask_in_background(fleet, "large", large)
            wait_until(lambda: agent._model_lock.num_waiting == 1)
            ask_in_background(fleet, "larger", large)
            ask_in_background(fleet, "small", small)
            wait_until(lambda: agent._jobs.num_waiting == 2)
            with pytest.raises(
                PromptError, match=r"need .* MB of caches; this device has 1 MB .*cache_budget_mb"
            ):
                fleet.ask(msgspec.structs.replace(ALONE, max_new_tokens=most))
            assert agent._jobs.num_waiting == 2
            cancel(fleet, "large")
            wait_until(lambda: next(iter(agent._active.values())).cancelled.is_set())
        assert finish(fleet, "large").last.finish_reason == "cancelled"
        cancel(fleet, "larger")
        for request in ("larger", "small"):
            assert finish(fleet, request).last.error is None
        wait_until(lambda: agent._jobs.free_bytes == agent._jobs.budget_bytes)


def test_a_request_cancelled_while_it_waits_leaves_at_once_without_a_token(
    long_bundle: Bundle,
) -> None:
    with memory_fleet() as fleet:
        agent, _ = fleet.start_device(
            long_bundle, AgentConfig(num_threads=1, cache_budget_mb=1, max_positions=8192)
        )
        most = most_positions(agent)
        large = msgspec.structs.replace(ALONE, max_new_tokens=most * 2 // 3)
        with agent._model_lock.of(APP):
            ask_in_background(fleet, "running", large)
            wait_until(lambda: agent._model_lock.num_waiting == 1)
            ask_in_background(fleet, "waiting", large)
            wait_until(lambda: agent._jobs.num_waiting == 1)
            cancel(fleet, "waiting")
            answer = finish(fleet, "waiting")
            cancel(fleet, "running")
        finish(fleet, "running")
    assert answer.last.finish_reason == "cancelled"
    assert answer.token_ids == []


def test_closing_ends_every_answer_and_every_thread(tiny_bundle: Bundle) -> None:
    long = msgspec.structs.replace(ALONE, max_new_tokens=400, temperature=2.0, seed=0)
    with memory_fleet() as fleet:
        agent, _ = fleet.start_device(tiny_bundle)
        requests = [f"r{i}" for i in range(6)]
        for request in requests:
            ask_in_background(fleet, request, long)
        for request in requests[:2]:
            fleet.next_reply(request)
        agent.__exit__(None, None, None)
        assert not [
            thread
            for thread in threading.enumerate()
            if thread.name.startswith(("answer-", "plan-"))
        ]
        ends = {finish(fleet, request).last.finish_reason for request in requests}
    assert ends <= {"cancelled", "stop", "length"}
    assert "cancelled" in ends


def test_an_answer_of_more_replies_than_a_link_keeps_is_repeated_whole(
    long_bundle: Bundle, tmp_path: Path
) -> None:
    asked = msgspec.structs.replace(ALONE, max_new_tokens=MAX_QUEUED + 100)
    config = AgentConfig(num_threads=1, max_positions=2 * MAX_QUEUED)
    topic = topics.device_prompt("d1", "a1", "r1")
    replies = Inbox()
    with (
        running_site("embedded", tmp_path) as site,
        site.connect("a1") as app,
        site.connect("d1") as link,
        Agent(link, long_bundle, config),
    ):
        app.subscribe(topics.device_reply("d1", "a1", "r1"), replies, qos=1)
        for _ in range(2):
            app.publish(topic, msgspec.json.encode(asked), qos=1)
            seqs = [decode_reply(replies.get(WAIT_S)[1]).seq for _ in range(MAX_QUEUED + 101)]
            assert seqs == list(range(MAX_QUEUED + 101))


def test_a_request_for_more_memory_than_the_process_gets_fails_alone(long_bundle: Bundle) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.system.short_of_memory", str(long_bundle.folder), str(LONG)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    large, small = found["replies"]
    assert large["error"]["code"] == "memory"
    assert "out of memory" in large["error"]["message"]
    assert small["finish_reason"] in ("length", "stop")
    assert [report["finish_reason"] for report in found["reports"]] == [
        "error",
        small["finish_reason"],
    ]
