"""Conversations: a turn runs and uploads only what is new in it, and its text stays the same."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final

import pytest
from tokenizers import pre_tokenizers

from benchmarks.whole_model import WholeModel
from cloud_broker_worker.worker.worker import Worker
from edge_agent.config import AgentConfig
from edge_agent.engine.prefix_tree import MIN_NEW
from edge_agent.serving.request_planner import MB
from fleet.bundles.manifest import Bundle
from fleet.protocol import topics
from fleet.protocol.codec import encode
from fleet.protocol.messages import Close
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import ChatMessage, PromptRequest
from fleet.transport.prompt_client import PromptClient
from tests.brokers import wait_until
from tests.system.memory_fleet import DEVICE, WAIT_S, WORKER, Answer, MemoryFleet, memory_fleet
from tests.tiny import SPECIAL_TOKENS

LETTERS: Final = [
    len(SPECIAL_TOKENS) + index
    for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    if character.isascii() and character.islower()
]
"""The ids of tokens that a text and its tokens agree on."""
QUESTIONS: Final = ("How warm is it?", "And now?", "Tell me about rivers.", "Why?")
NUM_TOKENS: Final = 12
ROW_BYTES: Final = 2 * 64
EDITED: Final = "How cold is it?"


def turn(messages: Sequence[ChatMessage], mode: Mode, **changes: object) -> PromptRequest:
    values = {
        "messages": tuple(messages),
        "mode": mode,
        "threshold": 0.05,
        "max_new_tokens": NUM_TOKENS,
        "logit_bias": {str(token_id): 100.0 for token_id in LETTERS},
    } | changes
    return PromptRequest(**values)  # type: ignore[arg-type]


class Chat:
    """A conversation of an app with a device, and its answers."""

    def __init__(self, fleet: MemoryFleet, mode: Mode, app: str = "chat-1") -> None:
        self.messages: list[ChatMessage] = [ChatMessage("system", "You answer in letters.")]
        self.answers: list[Answer] = []
        self.requests: list[PromptRequest] = []
        self._client = PromptClient(fleet.connect(app))
        self._mode = mode

    def ask(self, question: str, **changes: object) -> Answer:
        self.messages.append(ChatMessage("user", question))
        request = turn(self.messages, self._mode, **changes)
        answer = Answer(list(self._client.ask(DEVICE, request, timeout_s=WAIT_S)))
        self.messages.append(ChatMessage("assistant", answer.text))
        self.answers.append(answer)
        self.requests.append(request)
        return answer

    def num_new(self, number: int) -> int:
        """The tokens of a turn's prompt that no earlier turn has run."""
        earlier = self.answers[number - 1].usage
        return self.answers[number].usage.prompt_tokens - (earlier.prompt_tokens + NUM_TOKENS - 1)


def check_whole(whole: WholeModel, chat: Chat) -> None:
    """Check that every answer is the whole model's."""
    for request, answer in zip(chat.requests, chat.answers, strict=True):
        rules = request.choice_rules(answer.usage.prompt_tokens)
        assert request.messages is not None
        assert answer.token_ids == whole.generate(request.messages, NUM_TOKENS, rules=rules)


@pytest.fixture(scope="module")
def whole(tiny_bundle: Bundle) -> WholeModel:
    return WholeModel(tiny_bundle, num_threads=1)


def test_a_turn_alone_runs_what_is_new_and_its_text_is_that_of_an_app_without_a_past(
    tiny_bundle: Bundle,
) -> None:
    with memory_fleet() as fleet:
        fleet.start_device(tiny_bundle)
        chat = Chat(fleet, Mode.STANDALONE)
        for question in QUESTIONS:
            chat.ask(question)
        for number, request in enumerate(chat.requests):
            answer = chat.answers[number]
            if number:
                assert answer.usage.prompt_tokens - answer.usage.reused_tokens == chat.num_new(
                    number
                )
            stranger = PromptClient(fleet.connect(f"stranger-{number}"))
            fresh = Answer(list(stranger.ask(DEVICE, request, timeout_s=WAIT_S)))
            assert fresh.usage.reused_tokens == 0  # never across apps
            assert fresh.token_ids == answer.token_ids


def test_a_device_whose_share_for_reuse_is_0_begins_each_prompt_afresh(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        worker, _ = fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle, AgentConfig(num_threads=1, reuse_share=0.0))
        chat = Chat(fleet, Mode.VERIFIED)
        for question in QUESTIONS[:2]:
            assert chat.ask(question).usage.reused_tokens == 0
        wait_until(lambda: not worker.engine.sessions, "the session is closed")
        assert worker.engine.counters.num_continued == 0


def test_each_choice_of_a_request_after_the_first_reuses_the_prompt(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        fleet.start_device(tiny_bundle)
        chat = Chat(fleet, Mode.STANDALONE)
        usage = chat.ask(QUESTIONS[0], n=3, stream=False, temperature=1.0).usage
    assert usage.prompt_tokens - usage.reused_tokens == usage.prompt_tokens // 3 + 2 * MIN_NEW


@pytest.mark.parametrize("mode", [Mode.VERIFIED, Mode.COLLABORATIVE])
def test_a_turn_uploads_only_its_new_positions(
    tiny_bundle: Bundle, whole: WholeModel, mode: Mode
) -> None:
    with memory_fleet() as fleet:
        worker, _ = fleet.start_worker(tiny_bundle)
        agent, _ = fleet.start_device(tiny_bundle)
        chat = Chat(fleet, mode)
        for question in QUESTIONS:
            chat.ask(question, threshold=1.0)
        check_whole(whole, chat)
        for number in range(1, len(QUESTIONS)):
            usage = chat.answers[number].usage
            num_sent = chat.num_new(number) + NUM_TOKENS + usage.drafted
            envelopes = 500 + 120 * usage.round_trips
            assert usage.bytes_up < num_sent * ROW_BYTES + envelopes
            assert usage.prompt_tokens - usage.reused_tokens == chat.num_new(number)
        assert worker.engine.counters.num_continued == len(QUESTIONS) - 1
        assert len(worker.engine.sessions) == 1
        agent.close()
        wait_until(lambda: not worker.engine.sessions, "the worker has freed the session")
        worker.engine.check_integrity()


def test_rules_that_read_the_text_reach_over_the_whole_conversation(
    tiny_bundle: Bundle, whole: WholeModel
) -> None:
    with memory_fleet() as fleet:
        worker, _ = fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle)
        chat = Chat(fleet, Mode.VERIFIED)
        for question in QUESTIONS[:3]:
            chat.ask(question, repetition_penalty=1.3)
        assert worker.engine.counters.num_continued == 2
    check_whole(whole, chat)


def test_an_edited_history_continues_before_the_edit(
    tiny_bundle: Bundle, whole: WholeModel
) -> None:
    with memory_fleet() as fleet:
        worker, _ = fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle)
        chat = Chat(fleet, Mode.VERIFIED)
        for question in QUESTIONS[:3]:
            chat.ask(question)
        edited = chat.messages[-2:]  # the last question, and its answer
        del chat.messages[-2:]
        answer = chat.ask(EDITED)
        assert answer.usage.reused_tokens > chat.answers[1].usage.prompt_tokens
        chat.messages = [*chat.messages[:1], *edited]
        early = chat.ask(EDITED)
        assert 0 < early.usage.reused_tokens < chat.answers[1].usage.prompt_tokens
        check_whole(whole, chat)
        worker.engine.check_integrity()


def test_two_requests_that_continue_the_same_session_are_both_right(
    tiny_bundle: Bundle, whole: WholeModel
) -> None:
    with memory_fleet() as fleet:
        worker, _ = fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle)
        chat = Chat(fleet, Mode.VERIFIED)
        chat.ask(QUESTIONS[0])
        requests = [
            turn([*chat.messages, ChatMessage("user", text)], Mode.VERIFIED)
            for text in QUESTIONS[1:]
        ]
        answers: dict[int, Answer] = {}

        def ask(number: int) -> None:
            answers[number] = fleet.ask(requests[number])

        fleet.ask(chat.requests[0])  # another app's, to be continued by both
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        worker.engine.check_integrity()
    chat.requests += requests
    chat.answers += [answers[number] for number in range(len(requests))]
    check_whole(whole, chat)


def forget_sessions(fleet: MemoryFleet, worker: Worker) -> None:
    for key in list(worker.engine.sessions):
        fleet.watcher.publish(topics.to_worker(WORKER, *key), encode(Close(key.session)))
    wait_until(lambda: not worker.engine.sessions, "the worker has forgotten the session")


@pytest.mark.parametrize("fault", ["forgotten", "restarted", "replaced", "blinked", "device"])
def test_a_conversation_survives(tiny_bundle: Bundle, whole: WholeModel, fault: str) -> None:
    with memory_fleet() as fleet:
        worker, link = fleet.start_worker(tiny_bundle)
        agent, device_link = fleet.start_device(tiny_bundle)
        chat = Chat(fleet, Mode.VERIFIED)
        for question in QUESTIONS[:2]:
            chat.ask(question)
        if fault == "forgotten":
            forget_sessions(fleet, worker)
        elif fault == "restarted":
            link.drop()
            fleet.start_worker(tiny_bundle)
        elif fault == "replaced":
            link.drop()
            fleet.start_worker(tiny_bundle, name="worker-2")
        elif fault == "blinked":
            device_link.drop()
            device_link.restore()
        else:
            agent.close()
            device_link.drop()
            fleet.start_device(tiny_bundle)
        chat.ask(QUESTIONS[2])
        reused = chat.answers[2].usage.reused_tokens
        assert (reused > 0) == (fault != "device")
        assert chat.ask(QUESTIONS[3]).usage.reused_tokens > reused
    check_whole(whole, chat)


def test_a_budget_smaller_than_the_conversation_changes_no_token(
    tiny_bundle: Bundle, whole: WholeModel
) -> None:
    with memory_fleet() as fleet:
        fleet.start_worker(tiny_bundle)
        config = AgentConfig(num_threads=1, cache_budget_mb=1, reuse_share=0.25)
        agent, _ = fleet.start_device(tiny_bundle, config)
        chat = Chat(fleet, Mode.VERIFIED)
        for question in QUESTIONS:
            chat.ask(5 * question)
        usage = chat.answers[-1].usage
        assert 200 < usage.reused_tokens < usage.prompt_tokens - 50
        assert vars(agent)["_kept_caches"].num_bytes <= MB // 4
    check_whole(whole, chat)
