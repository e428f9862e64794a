"""A device and a worker over real brokers, asked by an app with nothing but mosquitto's clients."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.whole_model import WholeModel
from cloud_broker_worker.worker.config import WorkerConfig
from cloud_broker_worker.worker.worker import Worker
from edge_agent.config import AgentConfig
from edge_agent.serving.agent import Agent
from fleet.bundles.manifest import Bundle
from fleet.identity.identity import Identity
from fleet.protocol import topics
from fleet.protocol.codec import decode_to_device, encode
from fleet.protocol.messages import PROTOCOL, Open, Opened, Sampling
from fleet.protocol.prompt import PromptRequest
from fleet.protocol.report import WorkerStatus, decode_status
from fleet.transport.base import Will
from fleet.transport.prompt_client import PromptClient
from tests.brokers import BROKERS, HOST, Inbox, Site, find_mosquitto, running_site

TIMEOUT_S = 60
PROMPT = "How warm is it?"


@pytest.fixture(params=BROKERS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    with running_site(request.param, tmp_path) as running:
        yield running


@contextmanager
def serving(site: Site, bundle: Bundle) -> Iterator[None]:
    """The device d1 and the worker w1, both announced."""
    statuses = Inbox()
    with (
        site.connect("s1") as watcher,
        site.connect("w1", Will(topics.worker_status("w1"), Worker.will())) as cloud,
        site.connect("d1", Will(topics.device_status("d1"), Agent.will())) as edge,
        Worker(cloud, bundle, WorkerConfig(num_threads=1)),
        Agent(edge, bundle, AgentConfig(num_threads=1)),
    ):
        watcher.subscribe(topics.WORKER_STATUS_FILTER, statuses, qos=1)
        assert decode_status(statuses.get()[1], WorkerStatus).online
        yield


def client_command(program: str, identity: Identity, *arguments: str) -> list[str]:
    files = {"--cafile": "ca.pem", "--cert": "cert.pem", "--key": "key.pem"}
    tls = [word for option, name in files.items() for word in (option, str(identity.folder / name))]
    return [
        find_mosquitto(program),
        "-h",
        HOST,
        "-p",
        str(identity.config.port),
        "-q",
        "1",
        *tls,
        *arguments,
    ]


def lines_of(command: list[str]) -> Iterator[str]:
    """Yield the lines that a program prints to a terminal (a pipe would be buffered); end it."""
    ours, its = pty.openpty()
    with subprocess.Popen(command, stdout=its, close_fds=True) as process, os.fdopen(ours) as lines:
        os.close(its)
        killer = threading.Timer(TIMEOUT_S, process.kill)
        killer.start()
        try:
            yield from lines
        finally:
            killer.cancel()
            process.terminate()


def test_the_answer_over_a_real_broker_is_the_whole_models(site: Site, tiny_bundle: Bundle) -> None:
    whole = WholeModel(tiny_bundle, num_threads=1)
    with serving(site, tiny_bundle), site.connect("a1") as app:
        replies = list(
            PromptClient(app).ask(
                "d1", PromptRequest(prompt=PROMPT, threshold=1.0, max_new_tokens=16)
            )
        )
    token_ids = [reply.token_id for reply in replies if reply.token_id is not None]
    assert token_ids == whole.generate(PROMPT, 16)
    usage = replies[-1].usage
    assert usage is not None
    assert usage.sources == {"cloud": len(token_ids)}


@pytest.mark.parametrize("shared_opens", [False, True])
def test_an_open_comes_to_one_worker_over_the_topic_of_its_session(
    site: Site, tiny_bundle: Bundle, *, shared_opens: bool
) -> None:
    opening = Open(
        session="s1",
        epoch=1,
        bundle_id=tiny_bundle.manifest.bundle_id,
        protocol=PROTOCOL,
        sampling=Sampling(),
        max_positions=64,
        deadline_ms=1000,
    )
    config = WorkerConfig(num_threads=1, shared_opens=shared_opens)
    replies = Inbox()
    with (
        site.connect("w1") as cloud,
        site.connect("d1") as edge,
        Worker(cloud, tiny_bundle, config),
    ):
        edge.subscribe(topics.sessions_of_device("d1"), replies)
        edge.publish(topics.to_worker("w1", "d1", "s1"), encode(opening))
        opened = decode_to_device(replies.get()[1])
    assert isinstance(opened, Opened)
    assert opened.worker == "w1"


@pytest.mark.mosquitto
@pytest.mark.parametrize("message", [PROMPT, json.dumps({"prompt": PROMPT, "max_new_tokens": 4})])
def test_mosquitto_pub_asks_and_mosquitto_sub_shows_the_stream(
    tmp_path: Path, tiny_bundle: Bundle, message: str
) -> None:
    with running_site("embedded", tmp_path) as site, serving(site, tiny_bundle):
        identity = site.identity("a1")
        subscribe = client_command(
            "mosquitto_sub", identity, "-t", topics.device_reply("d1", "a1", "r1"), "-d"
        )
        publish = client_command(
            "mosquitto_pub", identity, "-t", topics.device_prompt("d1", "a1", "r1"), "-m", message
        )
        replies = []
        for line in lines_of(subscribe):
            if "SUBACK" in line:
                subprocess.run(publish, check=True, timeout=TIMEOUT_S)
            if line.startswith("{"):
                replies.append(json.loads(line))
                if replies[-1].get("done"):
                    break
    assert [reply["seq"] for reply in replies] == list(range(len(replies)))
    usage = replies[-1]["usage"]
    assert usage["tokens"] == len(replies) - 1 == sum(usage["sources"].values())
    assert {reply["source"] for reply in replies[:-1]} == set(usage["sources"])
