"""Repetitions of a request that has many replies: they cost the device little."""

from __future__ import annotations

import queue

import pytest

from edge_agent.serving import reply_resender
from edge_agent.serving.job_queue import Job
from edge_agent.serving.reply_resender import ReplyResender
from fleet.protocol import topics
from fleet.protocol.prompt import PromptRequest
from fleet.transport.in_memory import InMemoryBroker

WAIT_S = 30.0
DEVICE = "d1"


def job_of(app: str, num_replies: int) -> Job:
    job = Job(app=app, request="r1", prompt=PromptRequest(prompt="x"), send=lambda _: None)
    job.replies = [f"{app} {seq}".encode() for seq in range(num_replies)]
    return job


def test_repetitions_of_one_request_are_one_resend_and_other_apps_have_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reply_resender, "PAUSE_S", 0.0)
    arrived: queue.Queue[bytes] = queue.Queue()
    broker = InMemoryBroker()
    with broker.connect("app") as app, broker.connect(DEVICE) as device:
        app.subscribe(topics.device_reply(DEVICE, "+", "+"), lambda _, reply: arrived.put(reply))
        resender = ReplyResender(device)
        flood = job_of("flood", 3)
        other = job_of("other", 1)
        for _ in range(1000):
            resender.add(flood)
        resender.add(other)
        resender.start()
        replies = [arrived.get(timeout=WAIT_S) for _ in range(4)]
        assert replies == [*flood.replies, *other.replies]
        resender.add(flood)  # a repetition after the resend counts again
        assert [arrived.get(timeout=WAIT_S) for _ in range(3)] == flood.replies
        resender.close(WAIT_S)
    assert arrived.empty()
