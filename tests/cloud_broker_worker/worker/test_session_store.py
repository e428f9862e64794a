"""The eviction of caches, after which every session still gets its responses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cloud_broker_worker.worker.session import Session, SessionKey
from fleet.protocol.messages import Close, Continuation, Opened, Refused, Sampling, Verified, Verify
from tests.cloud_broker_worker.worker.conftest import DEVICE, Bench

CAPACITY = 64  # positions of a session that Bench opens


def budget(bench: Bench, num_caches: int, num_stores: int) -> int:
    """Bytes for so many caches and stores of `CAPACITY` positions."""
    shape = bench.engine.pool.shape
    return CAPACITY * (num_caches * shape.cache_bytes + num_stores * shape.hidden_bytes)


def fill(bench: Bench, session: str, device: str = DEVICE, num_rows: int = 12) -> None:
    """Open a session and upload rows of its own."""
    assert isinstance(bench.open(session, device=device)[0], Opened)
    bench.context(bench.upload(num_rows, seed=ord(session[0])), session=session, device=device)


def expected(bench: Bench, session: str, num_rows: int = 12) -> int:
    return bench.expected_token(bench.upload(num_rows, seed=ord(session[0])))


def steps_until_verdict(bench: Bench, key: SessionKey) -> int:
    """Step until the session has its verdict, which must be the whole model's."""
    session = bench.engine.sessions[key]
    rows = session.store.rows[: session.received].copy()
    for steps in range(1, 50):
        if message := bench.step().get(key):
            assert isinstance(message, Verified), message
            assert message.token_id == bench.expected_token(rows)
            return steps
    raise AssertionError(f"no verdict for {key} after {steps} steps")


def with_cache(bench: Bench) -> set[str]:
    return {key.session for key, session in bench.engine.sessions.items() if session.lease}


def test_sessions_that_share_one_cache_are_answered_in_the_order_in_which_they_asked(
    bench: Bench,
) -> None:
    bench.start(kv_budget_bytes=budget(bench, 1, 3), idle_after_s=5.0)
    for session in "abc":
        fill(bench, session)
        bench.now += 10  # the others are idle when the next one comes
    for i, session in enumerate("bca"):
        bench.now += 0.1
        bench.ask(11, session=session, request=i)
    for session in "bca":
        assert bench.token(session).token_id == expected(bench, session)
        assert with_cache(bench) == {session}
    assert bench.engine.step() is None


def test_a_session_that_asks_again_and_again_does_not_keep_the_cache_from_one_that_waits(
    bench: Bench,
) -> None:
    bench.start(kv_budget_bytes=budget(bench, 1, 2), idle_after_s=5.0)
    fill(bench, "a")
    bench.now += 10
    fill(bench, "b")
    bench.ask(11, session="a")
    bench.token("a")
    bench.now += 0.1
    bench.ask(11, session="b")
    bench.now += 0.1
    bench.ask(11, session="a", request=1)
    assert bench.step().keys() == {SessionKey(DEVICE, "b")}
    assert bench.step().keys() == {SessionKey(DEVICE, "a")}


def test_a_request_that_lacks_its_context_keeps_no_cache_from_one_that_can_be_answered(
    bench: Bench,
) -> None:
    bench.start(kv_budget_bytes=budget(bench, 1, 2), idle_after_s=5.0)
    fill(bench, "a")
    bench.ask(11, session="a")
    bench.token("a")
    bench.now += 10
    fill(bench, "b")
    bench.ask(40, session="a", request=1, deadline_ms=600_000)
    bench.ask(11, session="b")
    assert bench.token("b").token_id == expected(bench, "b")


def test_a_long_session_that_wakes_up_among_short_newcomers_is_still_answered(bench: Bench) -> None:
    shape = bench.engine.pool.shape
    bench.start(kv_budget_bytes=300 * (shape.cache_bytes + shape.hidden_bytes), idle_after_s=5.0)
    assert isinstance(bench.open("long", max_positions=256)[0], Opened)
    rows = bench.upload(200)
    bench.context(rows, session="long")
    for i in range(40):
        bench.now += 10
        bench.open(
            "long", max_positions=256
        )  # not the least recently used, but idle when the next one comes
        bench.now += 10
        device = f"edge-{i}"
        assert isinstance(bench.open(f"s{i}", device=device, max_positions=16)[0], Opened)
        assert bench.context(bench.upload(16), session=f"s{i}", device=device) == []
    assert len(bench.engine.sessions) < 41
    bench.ask(199, session="long")
    assert steps_until_verdict(bench, SessionKey(DEVICE, "long")) <= 13


def test_a_device_that_has_everything_in_use_makes_room_for_another_one_out_of_its_share(
    bench: Bench,
) -> None:
    bench.start(kv_budget_bytes=budget(bench, 4, 5), max_device_share=0.5)
    for session in "abcd":
        fill(bench, session)
        bench.ask(11, session=session)
        bench.token(session)
    refused = bench.open("e")[0]
    assert isinstance(refused, Refused)
    assert refused.code == "busy"
    fill(bench, "e", device="edge-2")
    bench.ask(11, session="e", device="edge-2")
    assert bench.token("e", "edge-2").token_id == expected(bench, "e")
    for session in "abcd":
        bench.ask(11, session=session, request=1)
        assert bench.token(session).token_id == expected(bench, session)


def test_context_that_runs_ahead_takes_no_cache_from_a_session_in_use_and_comes_to_an_end(
    bench: Bench,
) -> None:
    bench.start(kv_budget_bytes=budget(bench, 1, 2), idle_after_s=5.0, run_ahead_positions=4)
    fill(bench, "a")
    bench.now += 10
    fill(bench, "b")
    bench.context(bench.upload(13, seed=ord("a")), session="a")  # awake again, and without a cache
    steps = 0
    while bench.engine.step() is not None:
        steps += 1
        assert steps < 10
    assert len(with_cache(bench)) == 1


def test_run_ahead_gives_the_same_answer_with_nothing_left_to_run_but_the_request(
    bench: Bench,
) -> None:
    bench.start(run_ahead_positions=4)
    fill(bench, "a")
    while bench.engine.step() is not None:
        pass
    session = bench.engine.sessions[SessionKey(DEVICE, "a")]
    assert session.length == 11
    bench.ask(11, session="a")
    assert session.num_pending == 1
    assert bench.token("a").token_id == expected(bench, "a")
    assert bench.engine.counters.num_positions == 12  # none of them twice


def test_with_less_memory_than_the_budget_a_session_is_refused_and_others_are_served(
    bench: Bench,
) -> None:
    fill(bench, "a")
    bench.ask(11, session="a")
    bench.token("a")
    fill(bench, "b")
    pool = bench.engine.pool
    real = pool.shape
    pool.shape = replace(pool.shape, num_layers=1 << 40)
    pool.budget_bytes = 1 << 62
    bench.ask(11, session="b")
    refused = bench.step()[SessionKey(DEVICE, "b")]
    pool.shape = real
    pool.budget_bytes = 1 << 30
    assert isinstance(refused, Refused)
    assert (refused.code, refused.retry_after_ms > 0) == ("busy", True)
    assert "this machine does not have" in refused.message
    bench.ask(11, session="a", request=1)
    assert bench.token("a").token_id == expected(bench, "a")


def test_memory_that_does_not_agree_with_the_sessions_is_found(bench: Bench) -> None:
    fill(bench, "a")
    session = bench.engine.sessions[SessionKey(DEVICE, "a")]
    session.received = 65
    with pytest.raises(RuntimeError, match=r"0 positions have run, 65 arrived, 64 fit"):
        bench.engine.check_integrity()
    session.received = 12
    stray = bench.engine.pool.lease(5)
    with pytest.raises(RuntimeError, match="some belong to no session"):
        bench.engine.check_integrity()
    bench.engine.pool.free_lease(stray)


class Player:
    """Devices that do anything in any order with a worker that is short of memory; every answer is
    checked.
    """

    def __init__(self, bench: Bench, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.bench = bench
        self.num_answers = 0
        self.num_continued = 0
        self._request = 0
        bench.start(
            kv_budget_bytes=budget(bench, 2, 5),
            idle_after_s=2.0,
            max_batch_positions=10,
            run_ahead_positions=int(self.random.integers(0, 6)),
            window_bytes=1024,
        )

    def move(self) -> None:
        device = f"edge-{self.random.integers(2)}"
        session = f"s{self.random.integers(4)}"
        key = SessionKey(device, session)
        state = self.bench.engine.sessions.get(key)
        kind = self.random.choice(list(PROBABILITIES), p=list(PROBABILITIES.values()))
        if kind == "step":
            self.step()
        elif kind == "wait":
            self.bench.now += float(self.random.exponential(1.0))
        elif kind == "close":
            self.bench.send(Close(session, keep=bool(self.random.integers(2))), device)
        elif kind == "continue":
            self.go_on(device, session, f"s{self.random.integers(4)}")
        elif kind == "open" or state is None:
            sampling = Sampling(temperature=float(self.random.integers(2)), seed=3)
            self.bench.open(session, device, sampling=sampling, branch=state.branch if state else 0)
        elif kind == "context":
            start = max(0, state.received + int(self.random.integers(-3, 2)))
            rows = self.bench.upload(CAPACITY, seed=int(self.random.integers(5)))[start:][
                : self.random.integers(1, 12)
            ]
            branch = state.branch + int(self.random.choice([-1, 0, 0, 0, 0, 0, 1]))
            if len(rows) and branch >= 0:
                self.bench.context(rows, start, session, device, branch)
        else:
            self.ask(key, state)

    def go_on(self, device: str, session: str, earlier: str) -> None:
        """Open a session that continues another one, or itself; check the rows that it begins with
        and the answer that comes from them.
        """
        sessions = self.bench.engine.sessions
        known = sessions.get(SessionKey(device, earlier))
        rows = known.store.rows[: known.received].copy() if known else np.empty((0, 64), np.float16)
        continues = Continuation(
            session=earlier,
            branch=max(0, (known.branch if known else 0) - int(self.random.integers(8) == 0)),
            num_positions=int(self.random.integers(0, CAPACITY + 9)),
        )
        (reply,) = self.bench.open(
            session,
            device,
            epoch=1 + int(self.random.integers(9) == 0),
            max_positions=int(self.random.integers(20, 2 * CAPACITY)),
            continues=continues,
        ) or (None,)
        if not isinstance(reply, Opened) or session == earlier:
            return
        state = sessions[SessionKey(device, session)]
        if reply.received and SessionKey(device, earlier) not in sessions:
            assert reply.received <= continues.num_positions
            assert np.array_equal(state.store.rows[: reply.received], rows[: reply.received])
            self.num_continued += 1

    def ask(self, key: SessionKey, state: Session) -> None:
        self._request += int(self.random.integers(0, 2))
        position = max(0, state.received - int(self.random.integers(0, 8)))
        draft = tuple(
            int(token_id) for token_id in self.random.integers(0, 384, self.random.integers(1, 6))
        )
        if self.random.random() < 0.7 and position + len(draft) <= state.received:
            rows = state.store.rows[: position + len(draft)].copy()
            draft = (*self.bench.expected_tokens(rows, position)[:-1], draft[-1])
        self.bench.send(
            Verify(
                session=key.session,
                request=self._request,
                branch=state.branch,
                start=position,
                draft=draft,
                deadline_ms=1000,
            ),
            key.device,
        )

    def step(self) -> None:
        before = {
            key: (session.store.rows[: session.received].copy(), session.opening.sampling)
            for key, session in self.bench.engine.sessions.items()
        }
        for key, message in self.bench.engine.step() or []:
            rows, sampling = before[key]
            if sampling.temperature == 0.0:
                self.check(message, rows)
            self.num_answers += 1

    def check(self, message: object, rows: np.typing.NDArray[np.float16]) -> None:
        assert isinstance(message, Verified), message
        if message.token_id is not None:
            whole = self.bench.expected_tokens(rows, message.start)
            assert message.token_id == whole[message.accepted]


PROBABILITIES = {
    "open": 0.06,
    "context": 0.28,
    "verify": 0.28,
    "close": 0.04,
    "continue": 0.06,
    "step": 0.23,
    "wait": 0.05,
}


@pytest.mark.parametrize("seed", range(6))
def test_whatever_devices_do_the_memory_adds_up_and_every_answer_is_the_whole_models(
    bench: Bench, seed: int
) -> None:
    player = Player(bench, seed)
    for _ in range(600):
        player.move()
        bench.engine.check_integrity()
    assert player.num_answers > 10
    assert player.num_continued > 0
    bench.now += 1000
    bench.engine.expire()
    assert bench.engine.pool.used_bytes == 0
