"""Answers of a device and a worker together: sources, bytes, sampling, limits."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from edge_agent.config import AgentConfig
from fleet.bundles.manifest import Bundle
from fleet.errors import PromptError
from fleet.protocol import topics
from fleet.protocol.codec import decode_to_worker, unpack_chunk
from fleet.protocol.messages import Close
from fleet.protocol.modes import CLOUD, Mode
from fleet.protocol.prompt import ChatMessage, PromptRequest
from tests.conftest import MakeTinyBundle
from tests.recorded import chunks_of
from tests.system.memory_fleet import APP, DEVICE, WAIT_S, memory_fleet

PROMPT = "Tell me about the sea."


@pytest.mark.parametrize("thresholds", [(1.0, 1.0), (0.004, 1.0), (0.004, 0.004)])
@pytest.mark.parametrize("upload_layer", [1, 2])
def test_each_position_of_a_branch_goes_up_once_in_fp16_and_the_counted_bytes_are_those_on_the_wire(
    make_tiny_bundle: MakeTinyBundle, thresholds: tuple[float, float], upload_layer: int
) -> None:
    bundle = make_tiny_bundle((1, 2), upload_layer=upload_layer)
    row_bytes = bundle.manifest.model.hidden_size * 2
    sent: list[bytes] = []
    with memory_fleet() as fleet:
        fleet.watcher.subscribe(
            topics.to_worker("+", "+", "+"), lambda _, payload: sent.append(payload)
        )
        fleet.watcher.subscribe(topics.OPEN_FILTER, lambda _, payload: sent.append(payload))
        fleet.start_worker(bundle)
        fleet.start_device(bundle)
        answer = fleet.ask(PromptRequest(prompt=PROMPT, thresholds=thresholds, max_new_tokens=24))
        fleet.reports.get(timeout=WAIT_S)
    usage = answer.last.usage
    assert usage is not None
    contexts = chunks_of(map(decode_to_worker, sent))
    branch = 0
    end = 0
    for context in contexts:
        assert context.start == end if context.branch == branch else context.start <= end
        branch = context.branch
        end = context.start + context.count
    assert all(context.dtype == "float16" for context in contexts)
    assert all(len(context.data) == context.count * row_bytes for context in contexts)
    total = sum(map(len, sent))
    # A worker that opens the session after the answer's end is told to close it, uncounted.
    late = len(sent[-1]) if isinstance(decode_to_worker(sent[-1]), Close) else 0
    assert usage.bytes_up in (total, total - late)
    if CLOUD in usage.sources:
        last_asked = max(i for i, r in enumerate(answer.replies[:-1]) if r.source == CLOUD)
        assert end >= usage.prompt_tokens + last_asked


def test_a_mode_that_is_given_as_a_text_is_that_mode(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        fleet.start_worker(tiny_bundle)
        config = AgentConfig(num_threads=1, mode="standalone")  # type: ignore[arg-type]
        fleet.start_device(tiny_bundle, config)
        answer = fleet.ask(PromptRequest(prompt=PROMPT, threshold=1.0, max_new_tokens=8))
    assert CLOUD not in answer.sources
    assert answer.last.usage is not None
    assert answer.last.usage.mode is Mode.STANDALONE


def test_what_goes_up_are_the_hidden_states_at_the_upload_layer(tiny_bundle: Bundle) -> None:
    sent: list[bytes] = []
    with memory_fleet() as fleet:
        fleet.watcher.subscribe(
            topics.to_worker("+", "+", "+"), lambda _, payload: sent.append(payload)
        )
        fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle)
        fleet.ask(PromptRequest(prompt=PROMPT, threshold=1.0, max_new_tokens=8))
    rows = np.concatenate(
        [
            unpack_chunk(c, tiny_bundle.manifest.model.hidden_size)
            for c in chunks_of(map(decode_to_worker, sent))
        ]
    )
    assert np.isfinite(rows).all()
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_the_report_counts_what_the_reply_counted(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle)
        answer = fleet.ask(PromptRequest(prompt=PROMPT, thresholds=(0.004, 1.0), max_new_tokens=16))
        report = fleet.reports.get(timeout=WAIT_S)
    usage = answer.last.usage
    assert usage is not None
    assert report.sources == usage.sources
    assert (report.tokens, report.bytes_up, report.bytes_down) == (
        usage.tokens,
        usage.bytes_up,
        usage.bytes_down,
    )
    assert report.tokens == len(answer.token_ids) == sum(usage.sources.values())


def test_a_standalone_answer_sends_nothing_to_the_cloud(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle)
        answer = fleet.ask(
            PromptRequest(prompt=PROMPT, mode=Mode.STANDALONE, threshold=1.0, max_new_tokens=8)
        )
    assert answer.last.usage is not None
    assert answer.last.usage.bytes_up == answer.last.usage.bytes_down == 0
    assert set(answer.sources) == {"exit:2"}


def test_a_seed_gives_the_same_collaborative_answer_again(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle)
        answers = [
            fleet.ask(
                PromptRequest(
                    prompt=PROMPT, threshold=1.0, temperature=1.2, seed=seed, max_new_tokens=12
                )
            )
            for seed in (7, 7, 8)
        ]
    assert answers[0].token_ids == answers[1].token_ids != answers[2].token_ids


def test_replies_come_in_order_and_join_to_the_text(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        fleet.start_device(tiny_bundle)
        answer = fleet.ask(PromptRequest(prompt=PROMPT, mode=Mode.STANDALONE, max_new_tokens=12))
    assert [reply.seq for reply in answer.replies] == list(range(len(answer.replies)))
    assert answer.last.finish_reason in ("stop", "length")
    assert answer.text == "".join(reply.text for reply in answer.replies) != ""


def test_a_token_has_the_confidence_of_the_exit_that_chose_it(tiny_bundle: Bundle) -> None:
    threshold = 0.08
    with memory_fleet() as fleet:
        fleet.start_device(tiny_bundle)
        request = PromptRequest(
            prompt=PROMPT, mode=Mode.STANDALONE, threshold=threshold, max_new_tokens=24
        )
        answer = fleet.ask(request)
    by_source: dict[str, list[float]] = {}
    for reply in answer.replies[:-1]:
        assert reply.source is not None
        assert reply.confidence is not None
        by_source.setdefault(reply.source, []).append(reply.confidence)
    assert by_source.keys() == {"exit:1", "exit:2"}
    assert min(by_source["exit:1"]) >= threshold
    assert min(by_source["exit:2"]) < threshold


def test_a_conversation_is_longer_than_its_last_turn(tiny_bundle: Bundle) -> None:
    turns = (
        ChatMessage("user", "one"),
        ChatMessage("assistant", "two"),
        ChatMessage("user", "three"),
    )
    with memory_fleet() as fleet:
        fleet.start_device(tiny_bundle)
        short = fleet.ask(
            PromptRequest(messages=turns[-1:], mode=Mode.STANDALONE, max_new_tokens=2)
        )
        long = fleet.ask(PromptRequest(messages=turns, mode=Mode.STANDALONE, max_new_tokens=2))
    assert short.last.usage is not None
    assert long.last.usage is not None
    assert long.last.usage.prompt_tokens > short.last.usage.prompt_tokens


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b'{"prompt": "x", "mode": "psychic"}', "mode"),
        (b'{"prompt": "x", "threshold": 1.5}', "threshold"),
        (b'{"prompt": "x", "thresholds": [0.5]}', "2 thresholds"),
        (b'{"prompt": "x", "max_new_tokens": 0}', "max_new_tokens"),
        (b'{"prompt": "x", "temprature": 1}', "temprature"),
        (b'{"prompt": ', "JSON"),
        (b"   ", "empty"),
        (b"\xff\xfe", "UTF-8"),
        (b"word " * 4000, "shorter prompt"),
        (b"x" * 300_000, "at most"),
    ],
)
def test_a_bad_prompt_gets_one_clear_error_and_the_next_is_served(
    tiny_bundle: Bundle, payload: bytes, says: str
) -> None:
    with memory_fleet() as fleet:
        fleet.start_device(tiny_bundle)
        fleet.client._transport.publish(topics.device_prompt(DEVICE, APP, "bad"), payload, qos=1)
        reply = fleet.next_reply("bad")
        assert reply.done
        assert reply.error is not None
        assert says in reply.error.message
        assert "\n" not in reply.error.message
        assert fleet.ask(
            PromptRequest(prompt=PROMPT, mode=Mode.STANDALONE, max_new_tokens=2)
        ).token_ids


def test_above_the_limit_of_requests_the_device_says_that_it_is_busy(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        fleet.start_device(tiny_bundle, AgentConfig(num_threads=1, max_queued_requests=1))
        long = msgspec.json.encode(
            PromptRequest(prompt=PROMPT, mode=Mode.STANDALONE, threshold=1.0, max_new_tokens=400)
        )
        fleet.client._transport.publish(topics.device_prompt(DEVICE, APP, "first"), long, qos=1)
        with pytest.raises(PromptError, match="busy"):
            fleet.ask(PromptRequest(prompt=PROMPT))
        fleet.client._transport.publish(topics.device_cancel(DEVICE, APP, "first"), b"", qos=1)
        while not (reply := fleet.next_reply("first")).done:
            pass
        assert reply.finish_reason in ("cancelled", "stop")


def test_queued_requests_are_all_answered(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        fleet.start_device(tiny_bundle)
        one = msgspec.json.encode(
            PromptRequest(prompt=PROMPT, mode=Mode.STANDALONE, max_new_tokens=4)
        )
        for i in range(5):
            fleet.client._transport.publish(topics.device_prompt(DEVICE, APP, f"r{i}"), one, qos=1)
        for i in range(5):
            while not (reply := fleet.next_reply(f"r{i}")).done:
                pass
            assert reply.error is None
