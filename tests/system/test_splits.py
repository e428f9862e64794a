"""Any split, also none: the text is the whole model's, and a device moves between two answers."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from msgspec import UNSET

from benchmarks.whole_model import WholeModel
from cloud_broker_worker.worker.config import WorkerConfig
from cloud_broker_worker.worker.worker import Worker
from edge_agent.config import AgentConfig
from edge_agent.serving.agent import Agent
from edge_agent.update.supervisor import Supervisor
from fleet.bundles.manifest import Bundle
from fleet.bundles.verify import verify_bundle
from fleet.errors import PromptError
from fleet.protocol import topics
from fleet.protocol.desired_config import DesiredConfig, Settings, encode_desired
from fleet.protocol.modes import CLOUD, Mode
from fleet.protocol.prompt import ChatMessage, PromptRequest
from fleet.protocol.report import DeviceStatus, WorkerStatus, decode_status
from fleet.server.home import FleetConfig, FleetHome
from fleet.server.supervisor import fleet_processes
from fleet.transport.base import Will
from fleet.transport.mqtt import MqttTransport
from fleet.transport.prompt_client import PromptClient
from tests.brokers import HOST, Inbox, Site, free_port, running_site, wait_until
from tests.conftest import MakeTinyBundle
from tests.system.memory_fleet import DEVICE, WAIT_S, Answer, memory_fleet

PROMPTS = ("How warm is it?", "0123456789 " * 8)
NUM_TOKENS = 16
EXITS = (1, 2, 3, 4)
WHOLE = "exit:4"


@pytest.fixture(scope="module")
def bundle(make_tiny_bundle: MakeTinyBundle) -> Bundle:
    """A bundle with three upload layers, and the whole model for a device."""
    return make_tiny_bundle(EXITS, split=2, upload_layer=(1, 2, 3))


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> dict[str, list[int]]:
    whole = WholeModel(bundle, num_threads=1)
    return {prompt: whole.generate(prompt, NUM_TOKENS) for prompt in PROMPTS}


def verified(prompt: str, **changes: object) -> PromptRequest:
    fields = {"prompt": prompt, "mode": Mode.VERIFIED, "threshold": 0.05} | changes
    return PromptRequest(max_new_tokens=NUM_TOKENS, **fields)  # type: ignore[arg-type]


def with_split(split: int) -> AgentConfig:
    return AgentConfig(num_threads=1, split=split)


@pytest.mark.parametrize("split", EXITS)
def test_at_every_split_the_text_is_the_whole_models(
    bundle: Bundle, expected: dict[str, list[int]], split: int
) -> None:
    last = WHOLE if split == 4 else CLOUD
    with memory_fleet() as fleet:
        fleet.start_worker(bundle)
        fleet.start_device(bundle, with_split(split))
        for prompt in PROMPTS:
            assert fleet.ask(verified(prompt)).token_ids == expected[prompt]
            shared = PromptRequest(prompt=prompt, threshold=1.0, max_new_tokens=NUM_TOKENS)
            answer = fleet.ask(shared)
            assert answer.token_ids == expected[prompt]
            assert answer.sources == {last: len(answer.token_ids)}


@pytest.mark.parametrize("mode", [Mode.VERIFIED, Mode.AUTO, Mode.COLLABORATIVE])
def test_a_device_with_the_whole_model_answers_alone_and_reports_so(
    bundle: Bundle, expected: dict[str, list[int]], mode: Mode
) -> None:
    prompt = PROMPTS[0]
    with memory_fleet() as fleet:
        fleet.start_device(bundle, with_split(4))
        answer = fleet.ask(verified(prompt, mode=mode, threshold=1.0, min_agreement=1.0))
        report = fleet.reports.get(timeout=WAIT_S)
    assert answer.token_ids == expected[prompt]
    assert answer.last.note is None
    assert (report.mode, report.session, report.switches) == (mode, None, ())
    assert (report.sources, report.verifies) == ({WHOLE: len(answer.token_ids)}, 0)


def test_verified_tokens_of_the_whole_model_come_from_its_end_however_sure_an_exit_is(
    bundle: Bundle, expected: dict[str, list[int]]
) -> None:
    with memory_fleet() as fleet:
        agent, _ = fleet.start_device(bundle, with_split(4))
        assert fleet.ask(verified(PROMPTS[0], threshold=0.0)).token_ids == expected[PROMPTS[0]]
        assert agent.work.head_calls == len(expected[PROMPTS[0]])
        loose = fleet.ask(verified(PROMPTS[0], mode=Mode.STANDALONE, threshold=0.0))
    assert loose.sources == {"exit:1": len(loose.token_ids)}


def test_a_split_moves_between_two_answers_and_a_running_one_ends_at_its_own(
    bundle: Bundle, expected: dict[str, list[int]]
) -> None:
    prompt = PROMPTS[0]
    layers = []
    with memory_fleet() as fleet:
        worker, _ = fleet.start_worker(bundle)
        agent, _ = fleet.start_device(bundle, with_split(1))
        for version, split in enumerate((3, 4, 2), 1):
            answer = Answer()
            for reply in fleet.client.ask(DEVICE, verified(prompt), timeout_s=WAIT_S):
                answer.replies.append(reply)
                if reply.seq == 2:
                    sessions = worker.engine.sessions.values()
                    layers += [session.opening.upload_layer for session in sessions]
                    agent.follow(with_split(split), version)
            assert answer.token_ids == expected[prompt]
            wait_until(lambda: not worker.engine.sessions, "the session is closed")
        assert fleet.ask(verified(prompt)).token_ids == expected[prompt]
    assert layers == [UNSET, 3]


def test_a_device_holds_the_blocks_below_its_split_alone(bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        fleet.start_worker(bundle)
        agent, _ = fleet.start_device(bundle, with_split(3))
        kept, _, dropped = map(weakref.ref, agent._planner.partition.blocks)
        fleet.ask(verified(PROMPTS[0]))
        agent.follow(with_split(1), 1)
        wait_until(lambda: dropped() is None, "the blocks are dropped")
        assert agent._planner.partition.blocks == [kept()]


def test_a_worker_with_the_upper_layers_alone_serves_the_splits_that_it_can(
    bundle: Bundle, expected: dict[str, list[int]]
) -> None:
    with memory_fleet() as fleet:
        fleet.start_worker(bundle, WorkerConfig(num_threads=1, from_layer=3))
        agent, _ = fleet.start_device(bundle, with_split(2))
        with pytest.raises(
            PromptError, match=r"split_mismatch\): this worker continues after layer 3, the device"
        ):
            fleet.ask(verified(PROMPTS[0]))
        agent.follow(with_split(3), 1)
        assert fleet.ask(verified(PROMPTS[0])).token_ids == expected[PROMPTS[0]]


def test_a_bundle_for_devices_alone_has_no_half_for_the_cloud(
    make_tiny_bundle: MakeTinyBundle, expected: dict[str, list[int]]
) -> None:
    alone = make_tiny_bundle(EXITS)
    assert verify_bundle(alone.folder).findings == ()
    assert not (alone.folder / "cloud").exists()
    with memory_fleet() as fleet:
        fleet.start_device(alone)
        assert fleet.ask(verified(PROMPTS[0])).token_ids == expected[PROMPTS[0]]
    with memory_fleet() as fleet, pytest.raises(Exception, match=r"one of 4, the splits of bundle"):
        fleet.start_device(alone, with_split(2))


def test_a_fleet_whose_devices_hold_the_whole_model_starts_no_worker(
    make_tiny_bundle: MakeTinyBundle, tmp_path: Path
) -> None:
    config = FleetConfig(
        host=HOST, port=free_port(), bundle=str(make_tiny_bundle(EXITS).folder), service_port=0
    )
    with fleet_processes(FleetHome.create(tmp_path / "fleet", config)) as processes:
        assert len(processes.servers) == 1
        assert processes.workers == []


@contextmanager
def served(site: Site, bundle: Bundle) -> Iterator[tuple[MqttTransport, PromptClient, Inbox]]:
    """The device d1 under a supervisor and the worker w1, over a real broker."""
    statuses = Inbox()
    stop = threading.Event()
    identity = site.identity("d1")
    supervisor = Supervisor(identity.folder, with_split(1), bundle.folder, fetch=never)
    supervisor.prepare(stop)
    with (
        site.connect("s1") as server,
        site.connect("w1", Will(topics.worker_status("w1"), Worker.will())) as cloud,
        site.connect("d1", Will(topics.device_status("d1"), Agent.will())) as edge,
        site.connect("a1") as app,
        Worker(cloud, bundle, WorkerConfig(num_threads=1)),
    ):
        server.subscribe(topics.WORKER_STATUS_FILTER, statuses, qos=1)
        assert decode_status(statuses.get()[1], WorkerStatus).online
        server.unsubscribe(topics.WORKER_STATUS_FILTER)
        server.subscribe(topics.device_status("d1"), statuses, qos=1)
        thread = threading.Thread(target=supervisor.run, args=(edge,), daemon=True)
        thread.start()
        try:
            yield server, PromptClient(app), statuses
        finally:
            stop.set()
            thread.join(WAIT_S)


def never(*_: object) -> Path:
    raise AssertionError("no bundle is to be downloaded")


def test_a_conversation_goes_on_at_another_split_over_a_real_broker(
    tmp_path: Path, bundle: Bundle
) -> None:
    whole = WholeModel(bundle, num_threads=1)
    messages: list[ChatMessage] = []
    sources = []
    with (
        running_site("embedded", tmp_path) as site,
        served(site, bundle) as (server, app, statuses),
    ):
        for version, split in enumerate(EXITS, 1):
            desired = DesiredConfig(version, Settings(split=split))
            server.publish(topics.device_config("d1"), encode_desired(desired), qos=1, retain=True)
            while decode_status(statuses.get()[1], DeviceStatus).config_version != version:
                pass
            messages.append(ChatMessage("user", "And then?"))
            request = PromptRequest(
                messages=tuple(messages), mode=Mode.VERIFIED, max_new_tokens=NUM_TOKENS
            )
            answer = Answer(list(app.ask("d1", request, timeout_s=WAIT_S)))
            assert answer.token_ids == whole.generate(messages, NUM_TOKENS)
            messages.append(ChatMessage("assistant", answer.text))
            sources.append(answer.sources)
    assert sources[-1] == {WHOLE: NUM_TOKENS}
    assert WHOLE not in {source for each in sources[:-1] for source in each}
