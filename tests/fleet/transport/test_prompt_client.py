"""The time that an app waits for a reply."""

import threading
import time

import msgspec
import pytest

from fleet.errors import LinkError
from fleet.protocol import topics
from fleet.protocol.prompt import PromptRequest, Reply
from fleet.protocol.report import DeviceStatus
from fleet.transport.in_memory import InMemoryBroker
from fleet.transport.prompt_client import REPLY_TIMEOUT_S, PromptClient, reply_timeout_s


@pytest.mark.parametrize(
    ("request_", "answer_s"),
    [
        (PromptRequest(prompt="hi", deadline_ms=5000), 0.0),
        (PromptRequest(prompt="hi", deadline_ms=5000, stream=False), 5.0),
        (PromptRequest(prompt="hi", stream=False), 600.0),
    ],
)
def test_an_answer_in_one_reply_may_take_as_long_as_the_answer(
    request_: PromptRequest, answer_s: float
) -> None:
    assert reply_timeout_s(request_) == REPLY_TIMEOUT_S + answer_s


def status(*, online: bool) -> bytes:
    return msgspec.json.encode(
        DeviceStatus(online=online, epoch=1, bundle_id="b", version="0.1.0", mode="auto")
    )


def test_a_device_that_goes_offline_in_the_midst_of_an_answer_ends_the_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fleet.transport.open_requests.OFFLINE_S", 0.0)
    monkeypatch.setattr("fleet.transport.prompt_client.REPEAT_S", 0.05)
    broker = InMemoryBroker()
    topic = topics.device_status("kitchen")
    with broker.connect("kitchen") as device, broker.connect("app") as link:

        def begin(topic: str, payload: bytes) -> None:
            del payload
            _, app, request = topics.parse_topic(topic, topics.PROMPT_FILTER)
            first = msgspec.json.encode(Reply(seq=0, text="The", generation="g"))
            device.publish(topics.device_reply("kitchen", app, request), first)

        device.subscribe(topics.prompts_to("kitchen"), begin)
        device.publish(topic, status(online=True), retain=True)
        client = PromptClient(link)
        client.watch("kitchen")
        replies = client.ask("kitchen", PromptRequest(prompt="hi"))
        assert next(replies).text == "The"
        device.publish(topic, status(online=False), retain=True)
        with pytest.raises(LinkError, match="device kitchen has gone offline"):
            next(replies)


class EndlessDevice:
    """A device that sends replies without an end, and hears that it is to stop."""

    def __init__(self, broker: InMemoryBroker, first: int) -> None:
        self.link = broker.connect("kitchen")
        self.is_cancelled = threading.Event()
        self._first = first
        self.link.subscribe(topics.prompts_to("kitchen"), self._answer)
        self.link.subscribe(topics.cancels_to("kitchen"), lambda *_: self.is_cancelled.set())

    def _answer(self, topic: str, payload: bytes) -> None:
        del payload
        _, app, request = topics.parse_topic(topic, topics.PROMPT_FILTER)
        for seq in range(self._first, self._first + 100):
            reply = msgspec.json.encode(Reply(seq=seq, text="x" * 100))
            self.link.publish(topics.device_reply("kitchen", app, request), reply)


@pytest.mark.parametrize("first", [0, 1])
def test_a_device_that_does_not_stop_to_send_is_cut_off(
    first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleet.transport.open_requests.MAX_ANSWER_BYTES", 5000)
    broker = InMemoryBroker()
    device = EndlessDevice(broker, first)
    with device.link, broker.connect("app") as link:
        with pytest.raises(LinkError, match="device kitchen sent more than 5,000 bytes"):
            list(PromptClient(link).ask("kitchen", PromptRequest(prompt="hi")))
        assert device.is_cancelled.wait(60)


def test_a_device_that_does_not_keep_to_its_deadline_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broker = InMemoryBroker()
    device = EndlessDevice(broker, 0)
    with device.link, broker.connect("app") as link:
        replies = PromptClient(link).ask("kitchen", PromptRequest(prompt="hi", deadline_ms=1))
        assert next(replies).seq == 0
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + REPLY_TIMEOUT_S + 1)
        with pytest.raises(LinkError, match="has not ended its answer, although its deadline"):
            list(replies)
        monkeypatch.undo()
        assert device.is_cancelled.wait(60)
