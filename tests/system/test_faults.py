"""Faults, caused for real: a worker that dies, a link that is cut, garbage on every topic."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import msgspec
import pytest

from cloud_broker_worker.worker.config import WorkerConfig
from edge_agent.config import AgentConfig
from fleet.bundles.manifest import Bundle
from fleet.errors import BundleError, PromptError
from fleet.protocol import topics
from fleet.protocol.modes import CLOUD, FALLBACK, Mode
from fleet.protocol.prompt import PromptRequest
from tests.conftest import MakeTinyBundle
from tests.system.memory_fleet import DEVICE, WAIT_S, WORKER, Answer, memory_fleet

ASK_ALWAYS = PromptRequest(prompt="Tell me about the sea.", threshold=1.0, max_new_tokens=24)
GARBAGE = (
    b"",
    b"\x00" * 10,
    b"\xc1",
    b"{}",
    b"\x81\xa4type\xa4open",
    b"\xdd\xff\xff\xff\xff",
    b"x" * 400_000,
)


def test_a_worker_killed_in_mid_answer_leaves_the_device_to_finish_it(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        _, transport = fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle, AgentConfig(num_threads=1, assist_deadline_ms=500))
        answer = Answer()
        for reply in fleet.client.ask(DEVICE, ASK_ALWAYS, timeout_s=WAIT_S):
            answer.replies.append(reply)
            if reply.seq == 4:
                transport.drop()
        assert answer.last.error is None
        assert answer.sources[CLOUD] >= 5
        assert answer.sources[FALLBACK] >= 1
        assert sum(answer.sources.values()) == len(answer.token_ids)
        assert answer.last.note is not None


def test_the_worker_started_again_serves_the_next_answer(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        worker, transport = fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle)
        assert fleet.ask(ASK_ALWAYS).sources.keys() == {CLOUD}
        transport.drop()
        worker.__exit__(None, None, None)
        assert fleet.ask(ASK_ALWAYS).sources.keys() == {FALLBACK}
        fleet.start_worker(tiny_bundle)
        assert fleet.ask(ASK_ALWAYS).sources.keys() == {CLOUD}


def test_what_an_answer_has_emitted_when_its_deadline_passes_is_reported(
    tiny_bundle: Bundle,
) -> None:
    asked = PromptRequest(
        prompt="Tell me about the sea.",
        mode=Mode.VERIFIED,
        threshold=0.05,
        max_new_tokens=48,
        deadline_ms=1500,
    )
    with memory_fleet() as fleet:
        _, transport = fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle, AgentConfig(num_threads=1, assist_deadline_ms=500))
        answer = Answer()

        def ask() -> None:
            for reply in fleet.client.ask(DEVICE, asked, timeout_s=WAIT_S):
                answer.replies.append(reply)
                if reply.seq == 4:
                    transport.drop()

        with pytest.raises(PromptError, match="deadline"):
            ask()
        assert len(answer.token_ids) >= 5
        assert fleet.reports.get(timeout=WAIT_S).tokens == len(answer.token_ids)


def test_without_any_worker_the_answer_is_complete_and_says_why(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        fleet.start_device(tiny_bundle)
        answer = fleet.ask(ASK_ALWAYS)
    assert answer.sources.keys() == {FALLBACK}
    assert answer.last.note is not None
    assert "no cloud worker is online" in answer.last.note


def test_bundles_that_differ_do_not_talk_and_both_are_named(
    tiny_bundle: Bundle, make_tiny_bundle: MakeTinyBundle
) -> None:
    other = make_tiny_bundle((1, 3))
    with memory_fleet() as fleet:
        fleet.start_worker(other)
        fleet.start_device(tiny_bundle)
        answer = fleet.ask(ASK_ALWAYS)
    assert answer.sources.keys() == {FALLBACK}
    assert answer.last.note is not None
    assert tiny_bundle.manifest.bundle_id in answer.last.note
    assert other.manifest.bundle_id in answer.last.note


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda g: f"{len(g)}bytes")
def test_garbage_on_every_topic_disturbs_no_component(tiny_bundle: Bundle, garbage: bytes) -> None:
    everywhere = [
        topics.open_session(DEVICE),
        topics.open_session("UPPER"),
        topics.to_worker(WORKER, DEVICE, "s1"),
        topics.to_device(DEVICE, "s1"),
        topics.worker_status(WORKER + "x"),
        topics.device_cancel(DEVICE, "x", "y"),
        topics.device_prompt(DEVICE, "x", "y"),
        f"{topics.PREFIX}/w/{WORKER}/Ä/s1",
    ]
    with memory_fleet() as fleet:
        fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle)
        for topic in everywhere:
            fleet.watcher.publish(topic, garbage)
        assert fleet.ask(ASK_ALWAYS).sources.keys() == {CLOUD}


def test_a_worker_without_room_refuses_and_the_device_goes_on_alone(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        fleet.start_worker(tiny_bundle, WorkerConfig(num_threads=1, kv_budget_bytes=1000))
        fleet.start_device(tiny_bundle)
        answer = fleet.ask(ASK_ALWAYS)
    assert answer.sources.keys() == {FALLBACK}
    assert answer.last.note is not None
    assert "busy" in answer.last.note


def test_a_device_whose_link_was_cut_serves_again_when_it_is_back(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        fleet.start_worker(tiny_bundle)
        _, link = fleet.start_device(tiny_bundle)
        link.drop()
        link.restore()
        assert fleet.ask(ASK_ALWAYS).sources.keys() == {CLOUD}


def test_the_worker_keeps_nothing_of_answers_that_have_ended(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        worker, _ = fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle)
        for _ in range(3):
            fleet.ask(ASK_ALWAYS)
        worker.__exit__(None, None, None)
        worker.engine.pool.check_integrity()
        assert len(worker.engine.sessions) <= 1


def test_a_bundle_for_another_machine_is_refused_at_start(tiny_bundle: Bundle) -> None:
    other = Bundle(
        tiny_bundle.folder, msgspec.structs.replace(tiny_bundle.manifest, instruction_set="z80")
    )
    with (
        memory_fleet() as fleet,
        pytest.raises(BundleError, match="is for z80, this machine offers"),
    ):
        fleet.start_device(other)


def test_a_graph_that_does_not_load_is_refused_at_start(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_bundle.folder, tmp_path / "cut")
    path = folder / "edge/block_1.onnx"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with memory_fleet() as fleet, pytest.raises(BundleError, match=r"cannot load .*block_1.onnx"):
        fleet.start_device(Bundle(folder, tiny_bundle.manifest))


def test_a_thousand_sessions_leave_no_memory_behind(tiny_bundle: Bundle) -> None:
    asked = PromptRequest(
        prompt="0123456789 " * 20, mode=Mode.VERIFIED, threshold=0.05, max_new_tokens=2
    )
    resident_bytes = []
    with memory_fleet() as fleet:
        worker, _ = fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle)
        for _ in range(5):
            for _ in range(200):
                fleet.ask(asked)
            resident_bytes.append(
                int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
                * resource.getpagesize()
            )
        worker.__exit__(None, None, None)
        worker.engine.check_integrity()
        assert len(worker.engine.sessions) <= 1
    shape = worker.engine.pool.shape
    kept_by_a_session = 220 * (shape.cache_bytes + shape.hidden_bytes)  # the prompt's positions
    assert (
        resident_bytes[-1] - resident_bytes[0] < 100 * kept_by_a_session
    )  # and that were 800 sessions
