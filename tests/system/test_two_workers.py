"""Two workers share fifty conversations over a real mosquitto; one is killed in second turns."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from edge_agent.config import AgentConfig
from edge_agent.serving.agent import Agent
from fleet.bundles.manifest import Bundle
from fleet.errors import FleetError
from fleet.identity.identity import Identity
from fleet.protocol import topics
from fleet.protocol.access import Grants, Role
from fleet.protocol.prompt import PromptRequest, Reply
from fleet.protocol.report import GenerationReport, WorkerStatus, decode_status
from fleet.server.local_fleet import acknowledge
from fleet.transport.answers import Answer
from fleet.transport.base import Will
from fleet.transport.prompt_client import PromptClient
from tests.brokers import Inbox, Site, running_site
from tests.system.judge import first_turn, judge, next_turn

DEVICES = tuple(f"d{i}" for i in range(10))
SESSIONS_EACH = 5
NUM_SESSIONS = len(DEVICES) * SESSIONS_EACH
FLEET = (
    *(Grants(Role.DEVICE, name) for name in DEVICES),
    Grants(Role.APP, "a1", DEVICES),
    Grants(Role.WORKER, "w1"),
    Grants(Role.WORKER, "w2"),
    Grants(Role.SERVER, "s1"),
)
NUM_TOKENS = 64
WAIT_S = 120.0


@dataclass(kw_only=True)
class Asked:
    """The second turn of a conversation, and when its replies came."""

    device: str
    question: str
    request: PromptRequest | None = None
    first: Answer | None = None
    replies: list[Reply] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    error: FleetError | None = None

    def wait_s(self, since: float) -> float:
        """The longest time without a reply after `since`."""
        later = [moment for moment in self.times if moment > since]
        return max((b - a for a, b in pairwise([since, *later])), default=0.0)


@contextmanager
def worker_process(site: Site, name: str, bundle: Bundle) -> Iterator[subprocess.Popen[bytes]]:
    identity = site.identity(name)
    Identity(
        identity.folder, msgspec.structs.replace(identity.config, shared_subscriptions=True)
    ).save()
    command = [
        sys.executable,
        "-m",
        "cloud_broker_worker",
        "run",
        str(identity.folder),
        "--bundle",
        str(bundle.folder),
    ]
    with subprocess.Popen([*command, "--threads", "1"]) as process:
        try:
            yield process
        finally:
            process.kill()


def follow(client: PromptClient, asked: Asked, progress: threading.Semaphore) -> None:
    first = msgspec.structs.replace(first_turn(asked.question), deadline_ms=100_000)
    try:
        asked.first = Answer(list(client.ask(asked.device, first, timeout_s=WAIT_S)))
        asked.request = next_turn(first, asked.first, "And now?", NUM_TOKENS)
        for reply in client.ask(asked.device, asked.request, timeout_s=WAIT_S):
            asked.times.append(time.monotonic())
            asked.replies.append(reply)
            if len(asked.replies) == NUM_TOKENS // 4:
                progress.release()
    except FleetError as error:
        asked.error = error


@pytest.mark.mosquitto
def test_every_answer_ends_as_the_whole_models_though_a_worker_is_killed(
    tmp_path: Path, tiny_bundle: Bundle
) -> None:
    statuses = Inbox()
    half_way = threading.Semaphore(0)
    reports: queue.Queue[GenerationReport] = queue.Queue()
    config = AgentConfig(
        num_threads=1, max_concurrent_requests=SESSIONS_EACH, assist_deadline_ms=2000
    )
    asked = [
        Asked(device=DEVICES[i % len(DEVICES)], question=f"Tell me about number {i}.")
        for i in range(NUM_SESSIONS)
    ]
    with ExitStack() as stack:
        site = stack.enter_context(running_site("mosquitto", tmp_path, FLEET))
        watcher = stack.enter_context(site.connect("s1"))
        watcher.subscribe(topics.WORKER_STATUS_FILTER, statuses, qos=1)
        watcher.subscribe(
            topics.DEVICE_STATS_FILTER, lambda *it: reports.put(acknowledge(watcher, *it))
        )
        victim = stack.enter_context(worker_process(site, "w1", tiny_bundle))
        stack.enter_context(worker_process(site, "w2", tiny_bundle))
        online: set[str] = set()
        while len(online) < 2:
            topic, payload = statuses.get(WAIT_S)
            if decode_status(payload, WorkerStatus).online:
                online.add(topic)
        for name in DEVICES:
            edge = stack.enter_context(
                site.connect(name, Will(topics.device_status(name), Agent.will()))
            )
            stack.enter_context(Agent(edge, tiny_bundle, config))
        client = PromptClient(stack.enter_context(site.connect("a1")))
        threads = [
            threading.Thread(target=follow, args=(client, one, half_way), daemon=True)
            for one in asked
        ]
        for thread in threads:
            thread.start()
        for _ in range(NUM_SESSIONS // 4):
            assert half_way.acquire(timeout=WAIT_S)
        killed_at = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
        for thread in threads:
            thread.join(WAIT_S)
        counted: dict[str, GenerationReport] = {}
        while len(counted) < 2 * len(asked):
            report = reports.get(timeout=WAIT_S)
            counted[report.generation] = report
    assert [one.error for one in asked if one.error] == []
    for one in asked:
        assert one.request
        judge(tiny_bundle, one.request, Answer(one.replies))
    check_counts(list(counted.values()), asked)
    moved = [one for one in asked if one.replies[-1].note == "worker w1 went away"]
    assert moved
    worst = max(one.wait_s(killed_at) for one in moved)
    print(f"{len(moved)} of {len(asked)} answers lost their worker; longest wait {worst:.2f} s")


def check_counts(counted: list[GenerationReport], asked: list[Asked]) -> None:
    """The reports equal the emitted tokens; at the end w2 has all sessions still open."""
    replies = [[*one.first.replies, *one.replies] for one in asked if one.first]
    emitted = Counter(reply.source for each in replies for reply in each if reply.source)
    reported: Counter[str] = Counter()
    for report in counted:
        reported.update(report.sources)
    assert reported == emitted
    assert {report.worker for report in counted} >= {"w2"}
