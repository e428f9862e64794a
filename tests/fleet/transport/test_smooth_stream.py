"""The steady pace of an answer whose tokens arrive in bursts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Generator, Sequence
from itertools import pairwise
from statistics import pstdev

import pytest

from fleet.errors import LinkError, PromptError
from fleet.protocol.prompt import PromptRequest, Reply
from fleet.transport.responder import AsyncResponder, Responder
from fleet.transport.smooth_stream import MAX_LAG_S, StreamPace, paced


class Arrivals:
    """Replies that arrive at given times of a clock of their own."""

    def __init__(self, times: Sequence[float]) -> None:
        self.now = 0.0
        self.is_closed = False
        self._times = times

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def replies(self) -> Generator[Reply, None, None]:
        try:
            for number, arrived in enumerate(self._times, start=1):
                self.now = max(self.now, arrived)
                yield Reply(seq=number, text="a", done=number == len(self._times))
        finally:
            self.is_closed = True

    def paced(self) -> Generator[Reply, None, None]:
        return paced(self.replies(), self.clock, self.sleep)

    def shown(self) -> list[float]:
        """Return the times at which the replies are shown."""
        return [self.now for _ in self.paced()]


def random_bursts(seed: int) -> list[float]:
    draw = random.Random(seed)
    times: list[float] = []
    at = 0.5
    while len(times) < 200:
        times += [at] * draw.randint(1, 16)
        at += draw.uniform(0.02, 0.3)
    return times


BURSTS = [0.3 + 0.1 * (i // 8) for i in range(96)]


def delays(times: Sequence[float], shown: Sequence[float]) -> list[float]:
    return [after - before for before, after in zip(times, shown, strict=True)]


def test_bursts_of_tokens_are_shown_at_a_steady_pace() -> None:
    shown = Arrivals(BURSTS).shown()
    gaps = [after - before for before, after in pairwise(shown[16:])]
    arrived = [after - before for before, after in pairwise(BURSTS[16:])]
    assert pstdev(gaps) < 0.4 * pstdev(arrived)
    assert max(gaps) < 0.3 * max(arrived)


@pytest.mark.parametrize("seed", range(5))
def test_no_reply_and_no_end_comes_later_than_the_limit(seed: int) -> None:
    times = random_bursts(seed)
    late = delays(times, Arrivals(times).shown())
    assert min(late) >= 0
    assert max(late) < MAX_LAG_S


@pytest.mark.parametrize("interval_s", [0.002, 0.02, 0.5])
def test_tokens_that_arrive_steadily_are_not_delayed(interval_s: float) -> None:
    times = [interval_s * i for i in range(60)]
    assert sum(delays(times, Arrivals(times).shown())) < 0.2 * interval_s * len(times)


def test_a_burst_that_is_the_rest_of_the_answer_ends_within_the_limit() -> None:
    times = [0.2 * i for i in range(10)] + [2.0] * 300
    assert max(delays(times, Arrivals(times).shown())) < MAX_LAG_S


def test_the_last_reply_is_not_delayed_itself() -> None:
    arrivals = Arrivals([0.0, 0.1, 0.2, 0.2])
    *_, before, last = arrivals.shown()
    assert last == before


def test_delays_are_a_function_of_the_times_alone() -> None:
    pace = StreamPace()
    assert pace.delay_s(0.0, 1.0) == 0.0
    assert pace.delay_s(1.0, 1.1) == 0.0
    assert pace.delay_s(1.1, 1.1) == pytest.approx(0.05)  # a quarter of the limit
    assert pace.delay_s(1.15, 1.15) == pytest.approx(0.0375)


def test_a_stream_that_is_left_closes_its_replies_at_once() -> None:
    arrivals = Arrivals(BURSTS)
    stream = arrivals.paced()
    next(stream)
    stream.close()
    assert arrivals.is_closed


def test_an_interrupt_in_a_delay_closes_the_replies() -> None:
    arrivals = Arrivals(BURSTS)

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(paced(arrivals.replies(), arrivals.clock, interrupt))
    assert arrivals.is_closed


def test_an_error_of_the_replies_comes_through() -> None:
    def fails() -> Generator[Reply, None, None]:
        yield Reply(seq=1, text="a")
        raise LinkError("gone")

    with pytest.raises(LinkError, match="gone"):
        list(paced(fails()))


class Echo(Responder):
    def respond(self, request: PromptRequest) -> Generator[Reply, None, None]:
        for number, text in enumerate((request.prompt or "").split(), start=1):
            yield Reply(seq=number, text=text)
        yield Reply(seq=0, done=True)


class AsyncEcho(AsyncResponder):
    async def respond(self, request: PromptRequest) -> AsyncGenerator[Reply, None]:
        for reply in Echo().respond(request):
            yield reply


def test_answers_in_python_have_the_same_replies_at_a_steady_pace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[float] = []
    delay_s = StreamPace.delay_s

    def record(pace: StreamPace, asked_at: float, arrived_at: float) -> float:
        asked.append(arrived_at)
        return delay_s(pace, asked_at, arrived_at)

    monkeypatch.setattr(StreamPace, "delay_s", record)
    assert Echo().generate("a b c", smooth_stream=True).text == "abc"
    assert len(asked) == 3
    answer = asyncio.run(AsyncEcho().generate("a b c", smooth_stream=True).complete())
    assert answer.text == "abc"
    assert len(asked) == 6
    assert Echo().generate("a b c").text == "abc"
    assert len(asked) == 6
    with pytest.raises(PromptError, match="smooth_stream: expected True or False, got 'yes'"):
        Echo().generate("a", smooth_stream="yes")
