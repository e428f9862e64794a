"""Replies that a broker loses on the way to an app are requested again and arrive once."""

from __future__ import annotations

import msgspec
import pytest

from fleet.bundles.manifest import Bundle
from fleet.errors import LinkError
from fleet.protocol import topics
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import PromptRequest, Reply
from fleet.transport.in_memory import InMemoryTransport
from fleet.transport.prompt_client import PromptClient
from tests.system.memory_fleet import APP, DEVICE, WAIT_S, MemoryFleet, memory_fleet

ALONE = PromptRequest(prompt="How warm is it?", mode=Mode.STANDALONE, max_new_tokens=24)


def second_client(fleet: MemoryFleet) -> tuple[PromptClient, InMemoryTransport]:
    transport = fleet.broker.connect("app-2")
    return PromptClient(transport), transport


def test_an_app_whose_link_was_cut_gets_every_reply_once(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        fleet.start_device(tiny_bundle)
        expected = fleet.ask(ALONE)
        client, link = second_client(fleet)
        replies: list[Reply] = []
        for reply in client.ask(DEVICE, ALONE, timeout_s=WAIT_S):
            replies.append(reply)
            if reply.seq in (1, 7):
                link.drop()
                link.restore()
        link.close()
    assert [reply.seq for reply in replies] == list(range(len(expected.replies)))
    assert [reply.token_id for reply in replies if reply.token_id is not None] == expected.token_ids


def test_a_request_that_comes_again_brings_the_same_replies_again(tiny_bundle: Bundle) -> None:
    topic = topics.device_prompt(DEVICE, APP, "r1")
    payload = msgspec.json.encode(ALONE)
    with memory_fleet() as fleet:
        fleet.start_device(tiny_bundle)
        runs: list[list[Reply]] = []
        for _ in range(2):
            fleet.watcher.publish(topic, payload, qos=1)
            runs.append([fleet.next_reply("r1")])
            while not runs[-1][-1].done:
                runs[-1].append(fleet.next_reply("r1"))
        assert runs[0] == runs[1]
        assert fleet.reports.get(timeout=WAIT_S).tokens == 24
        assert fleet.reports.empty()


def test_a_device_that_has_forgotten_the_answer_does_not_continue_it_with_another(
    tiny_bundle: Bundle,
) -> None:
    with memory_fleet() as fleet:
        agent, link = fleet.start_device(tiny_bundle)
        client, app_link = second_client(fleet)
        long = msgspec.structs.replace(ALONE, max_new_tokens=400, temperature=2.0, seed=0)
        stream = client.ask(DEVICE, long, timeout_s=WAIT_S)
        assert next(stream).seq == 0
        with agent._model_lock.of(
            APP
        ):  # no step can run: the request is in progress when the link fails
            app_link.drop()
        agent.__exit__(None, None, None)
        link.close()
        fleet.start_device(tiny_bundle)
        app_link.restore()
        with pytest.raises(LinkError, match="has restarted and lost this request"):
            list(stream)
        app_link.close()
