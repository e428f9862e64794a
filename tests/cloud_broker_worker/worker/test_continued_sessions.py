"""Sessions that continue an earlier one of their device, message by message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from msgspec import UNSET

from cloud_broker_worker.worker.session import Session, SessionKey
from fleet.protocol.codec import TOKEN_DTYPE, pack_chunk
from fleet.protocol.hidden_states import Float16
from fleet.protocol.messages import (
    ChoiceRules,
    Close,
    Context,
    Continuation,
    Opened,
    Refused,
    Sampling,
    Verified,
)
from fleet.protocol.report import DeviceStatus
from tests.cloud_broker_worker.worker.conftest import DEVICE, Bench, LayersAt, TinyModel

NUM_FIRST = 20
NUM_ALL = 30
PENALTY = ChoiceRules(repetition_penalty=1.5, prompt_length=NUM_FIRST)
OTHER = "edge-2"


def earlier(session: str = "s1", branch: int = 0, num_positions: int = NUM_FIRST) -> Continuation:
    return Continuation(session=session, branch=branch, num_positions=num_positions)


def answer(bench: Bench, rows: Float16, session: str = "s1", **changes: Any) -> None:
    """An answer that ends in order: a session with these rows, which the device keeps."""
    assert bench.open(session, **changes) == [opened(session, 0)]
    bench.context(rows, session=session)
    bench.verify(len(rows) - 1, bench.expected_tokens(rows, len(rows) - 1), session=session)
    bench.step()
    keep(bench, session)


def keep(bench: Bench, session: str = "s1") -> None:
    assert bench.send(Close(session, keep=True)) == []


def opened(session: str, received: int) -> Opened:
    return Opened(
        session=session,
        worker="worker-1",
        received=received,
        max_chunk_bytes=96 * 1024,
        window_bytes=1 << 20,
        dtypes=("float16", "int8"),
    )


def names(bench: Bench) -> set[str]:
    return {key.session for key in bench.engine.sessions}


def state(bench: Bench, session: str) -> Session:
    return bench.engine.sessions[SessionKey(DEVICE, session)]


def check_answer(bench: Bench, rows: Float16, session: str = "s2") -> None:
    """Upload what the worker lacks of `rows`; the token after them is the whole model's."""
    received = state(bench, session).received
    bench.context(rows[received:], start=received, session=session)
    bench.ask(len(rows) - 1, session=session)
    while not (verdict := bench.step().get(SessionKey(DEVICE, session))):
        pass
    assert isinstance(verdict, Verified), verdict
    logprobs = bench.whole.logits(rows, bench.UPLOAD_LAYER)[-1].log_softmax(-1)
    assert verdict.token_id == int(logprobs.argmax())
    assert verdict.logprobs[-1] == pytest.approx(float(logprobs.max()), abs=1e-4)


# What is reused.


def test_a_session_goes_on_from_another_one_and_only_what_is_new_is_sent_and_run(
    bench: Bench,
) -> None:
    rows = bench.upload(NUM_ALL)
    answer(bench, rows[:NUM_FIRST])
    assert bench.open("s2", continues=earlier()) == [opened("s2", NUM_FIRST)]
    assert names(bench) == {"s2"}
    check_answer(bench, rows)
    counters = bench.engine.counters
    assert (counters.num_continued, counters.num_reused) == (1, NUM_FIRST)
    assert counters.num_positions == NUM_ALL


def test_an_edited_history_keeps_what_is_before_the_edit(bench: Bench) -> None:
    rows = bench.upload(NUM_ALL)
    edited = bench.upload(NUM_ALL, seed=1)
    edited[:9] = rows[:9]
    answer(bench, rows)
    assert bench.open("s2", continues=earlier(num_positions=9)) == [opened("s2", 9)]
    check_answer(bench, edited)


def test_an_earlier_session_may_end_on_a_later_branch(bench: Bench) -> None:
    rows = bench.upload(NUM_ALL)
    bench.open()
    bench.context(rows[:NUM_FIRST])
    bench.ask(15)  # a rejected draft
    bench.token()
    keep(bench)
    assert bench.open("s2", continues=earlier(branch=1)) == [opened("s2", 16)]
    assert state(bench, "s2").branch == 0
    check_answer(bench, rows)


def test_a_verdict_after_a_continuation_is_that_of_a_session_of_its_own(bench: Bench) -> None:
    rows = bench.upload(NUM_ALL)
    sampling = Sampling(temperature=1.3, seed=11)
    answer(bench, rows[:NUM_FIRST])
    bench.open("s2", sampling=sampling, continues=earlier())
    bench.open("s3", sampling=sampling)
    bench.context(rows[NUM_FIRST:], start=NUM_FIRST, session="s2")
    bench.context(rows, session="s3")
    for session in ("s2", "s3"):
        bench.ask(NUM_ALL - 1, session=session)
    responses = bench.step()
    continued, fresh = (responses[SessionKey(DEVICE, session)] for session in ("s2", "s3"))
    assert isinstance(continued, Verified)
    assert isinstance(fresh, Verified)
    assert continued.token_id == fresh.token_id
    assert continued.logprobs == pytest.approx(fresh.logprobs, abs=1e-4)


def test_a_cache_that_was_evicted_is_built_again_from_the_rows(bench: Bench) -> None:
    rows = bench.upload(NUM_ALL)
    answer(bench, rows[:NUM_FIRST])
    bench.engine.session_store.evict(state(bench, "s1"))
    assert bench.open("s2", continues=earlier()) == [opened("s2", NUM_FIRST)]
    check_answer(bench, rows)


@pytest.mark.parametrize(("max_positions", "received"), [(500, 20), (33, 20), (31, 20), (9, 9)])
def test_the_new_session_may_be_longer_or_shorter(
    bench: Bench, max_positions: int, received: int
) -> None:
    rows = bench.upload(NUM_ALL)
    answer(bench, rows[:NUM_FIRST])
    (reply,) = bench.open("s2", continues=earlier(), max_positions=max_positions)
    assert reply == opened("s2", received)
    check_answer(bench, rows[: min(NUM_ALL, max_positions)])
    (refused,) = bench.context(rows[:1], start=max_positions, session="s2")
    assert isinstance(refused, Refused)
    assert refused.code == "too_long"


def test_a_conversation_grows_beyond_the_memory_of_its_first_session(bench: Bench) -> None:
    rows = bench.upload(500)
    answer(bench, rows[:60])
    for turn, length in enumerate((150, 151, 400, 500), start=2):
        known = state(bench, f"s{turn - 1}").received
        continues = earlier(f"s{turn - 1}", num_positions=known)
        (reply,) = bench.open(f"s{turn}", continues=continues, max_positions=length)
        assert reply == opened(f"s{turn}", known)
        check_answer(bench, rows[:length], f"s{turn}")
        bench.engine.check_integrity()
        state(bench, f"s{turn}").branch = 0
        keep(bench, f"s{turn}")
    assert bench.engine.counters.num_positions == 500


def test_a_short_session_does_not_hold_the_memory_of_a_long_one(bench: Bench) -> None:
    rows = bench.upload(400)
    answer(bench, rows, max_positions=400)
    assert bench.open("s2", continues=earlier(), max_positions=100) == [opened("s2", 0)]
    assert bench.engine.pool.used_bytes == 0
    check_answer(bench, rows[:30])


# What is not.


def with_a_job(bench: Bench) -> None:
    bench.verify(NUM_FIRST - 1, (1, 2, 3), request=9)


def closed(bench: Bench) -> None:
    bench.send(Close("s1"))


@pytest.mark.parametrize(
    ("changes", "before"),
    [
        ({"epoch": 2}, None),
        ({"continues": earlier(branch=1)}, None),
        ({"continues": earlier("s9")}, None),
        ({"continues": earlier(num_positions=0)}, None),
        ({"rules": PENALTY}, None),
        ({}, with_a_job),
        ({}, closed),
    ],
    ids=["epoch", "branch", "unknown", "nothing", "text", "pending", "closed"],
)
def test_every_other_session_opens_afresh(
    bench: Bench, changes: dict[str, Any], before: Callable[[Bench], None] | None
) -> None:
    rows = bench.upload(NUM_ALL)
    answer(bench, rows[:NUM_FIRST])
    if before:
        before(bench)
    assert bench.open("s2", **{"continues": earlier()} | changes) == [opened("s2", 0)]
    bench.engine.check_integrity()
    if "rules" not in changes:
        check_answer(bench, rows)
    assert bench.engine.counters.num_continued == 0


def test_a_session_of_another_device_is_out_of_reach(bench: Bench) -> None:
    rows = bench.upload(NUM_ALL)
    answer(bench, rows[:NUM_FIRST])
    assert bench.open("s2", OTHER, continues=earlier()) == [opened("s2", 0)]
    assert bench.open("s2", continues=earlier()) == [opened("s2", NUM_FIRST)]
    check_answer(bench, rows)


def test_another_upload_layer_opens_afresh(layers_at: LayersAt, whole: TinyModel) -> None:
    bench = Bench(layers_at(1, 2), whole)
    rows = bench.upload(NUM_FIRST)
    bench.open(upload_layer=2)
    bench.context(rows)
    keep(bench)
    assert bench.open("s2", upload_layer=1, continues=earlier()) == [opened("s2", 0)]
    bench.engine.check_integrity()


def test_an_open_that_comes_again_changes_nothing_with_or_without_the_field(bench: Bench) -> None:
    rows = bench.upload(NUM_ALL)
    answer(bench, rows[:NUM_FIRST])
    for continues in (earlier(), earlier(), UNSET):
        assert bench.open("s2", continues=continues) == [opened("s2", NUM_FIRST)]
    assert bench.engine.counters.num_continued == 1
    check_answer(bench, rows)


def test_of_two_sessions_that_continue_the_same_one_the_first_gets_it(bench: Bench) -> None:
    rows = bench.upload(NUM_ALL)
    answer(bench, rows[:NUM_FIRST])
    assert bench.open("s2", continues=earlier()) == [opened("s2", NUM_FIRST)]
    assert bench.open("s3", continues=earlier()) == [opened("s3", 0)]
    for session in ("s2", "s3"):
        check_answer(bench, rows, session)


def test_late_messages_of_the_earlier_session_reach_no_other(bench: Bench) -> None:
    rows = bench.upload(NUM_ALL)
    answer(bench, rows[:NUM_FIRST])
    bench.open("s2", continues=earlier())
    for late in (
        Context("s1", pack_chunk(0, 0, bench.upload(5, seed=3))),
        Close("s1", keep=True),
        Close("s1"),
    ):
        bench.send(late)
    assert names(bench) == {"s2"}
    check_answer(bench, rows)


# Rules that need the text.


def send_text(bench: Bench, rows: Float16, text: list[int], session: str, start: int = 0) -> None:
    tokens = np.array(text[start:], TOKEN_DTYPE)
    chunk = pack_chunk(bench.branch(session, DEVICE), start, rows[start:], tokens=tokens)
    assert bench.send(Context(session, chunk)) == []


def test_rules_that_read_the_text_reuse_positions_whose_tokens_are_known(bench: Bench) -> None:
    rows = bench.upload(NUM_ALL)
    text = list(range(10, 10 + NUM_ALL))
    bench.open(rules=PENALTY)
    send_text(bench, rows[:NUM_FIRST], text[:NUM_FIRST], "s1")
    keep(bench)
    bench.open("s2", continues=earlier(), rules=PENALTY)
    assert state(bench, "s2").received == NUM_FIRST
    bench.open("s3", rules=PENALTY)
    send_text(bench, rows, text, "s2", NUM_FIRST)
    send_text(bench, rows, text, "s3")
    for session in ("s2", "s3"):
        assert state(bench, session).tokens == text
        bench.ask(NUM_ALL - 1, session=session)
    responses = bench.step()
    continued, fresh = (responses[SessionKey(DEVICE, session)] for session in ("s2", "s3"))
    assert isinstance(continued, Verified)
    assert isinstance(fresh, Verified)
    assert continued.token_id == fresh.token_id


def test_tokens_are_known_as_far_as_all_sessions_of_a_conversation_had_them(bench: Bench) -> None:
    rows = bench.upload(NUM_ALL)
    bench.open(rules=PENALTY)
    send_text(bench, rows[:12], list(range(12)), "s1")
    keep(bench)
    bench.open("s2", continues=earlier())  # without rules: its chunks have no tokens
    bench.context(rows[12:], start=12, session="s2")
    keep(bench, "s2")
    continues = earlier("s2", num_positions=NUM_ALL)
    assert bench.open("s3", continues=continues, rules=PENALTY) == [opened("s3", 12)]
    assert state(bench, "s3").tokens == list(range(12))


# Memory and limits.


def test_kept_sessions_are_idle_at_once_and_never_in_the_way_of_others(bench: Bench) -> None:
    bench.start(max_sessions_per_device=2)
    rows = bench.upload(NUM_FIRST)
    for i in range(5):
        answer(bench, rows, f"s{i}")
    assert names(bench) == {"s3", "s4"}
    assert bench.engine.num_in_use == 0


def test_a_kept_session_gives_way_before_one_that_is_silent(bench: Bench) -> None:
    store_bytes = 64 * bench.engine.pool.shape.hidden_bytes
    bench.start(kv_budget_bytes=bench.session_bytes(128) + store_bytes)  # of one idle session
    for session in ("silent", "kept"):
        bench.open(session)
        bench.context(bench.upload(12), session=session)
        bench.now += 100
    keep(bench, "kept")
    bench.open("new", OTHER, max_positions=128)
    assert bench.context(bench.upload(128), session="new", device=OTHER) == []
    assert names(bench) == {"silent", "new"}


def test_a_session_that_goes_on_after_its_end_is_in_use_again(bench: Bench) -> None:
    rows = bench.upload(NUM_ALL)
    answer(bench, rows[:NUM_FIRST])
    bench.context(rows[NUM_FIRST:], start=NUM_FIRST)
    assert bench.engine.num_in_use == 1


def test_the_end_of_a_session_stops_its_work(bench: Bench) -> None:
    bench.open()
    bench.context(bench.upload(8))
    bench.ask(7)
    keep(bench)
    assert bench.engine.step() is None


def test_a_session_without_room_is_refused_and_the_earlier_one_stays_for_the_next_try(
    bench: Bench,
) -> None:
    rows = bench.upload(NUM_ALL)
    bench.start(kv_budget_bytes=bench.session_bytes(64 * 3), max_device_share=1.0)
    answer(bench, rows[:NUM_FIRST])
    bench.open("large", max_positions=160)
    bench.context(bench.upload(160), session="large")
    (refused,) = bench.open("s2", continues=earlier())
    assert isinstance(refused, Refused)
    assert (refused.code, refused.retry_after_ms > 0) == ("busy", True)
    bench.send(Close("large"))
    assert bench.open("s2", continues=earlier()) == [opened("s2", NUM_FIRST)]
    check_answer(bench, rows)


def test_a_kept_session_survives_a_short_absence_of_its_device_and_not_a_restart(
    bench: Bench,
) -> None:
    rows = bench.upload(NUM_FIRST)
    online = DeviceStatus(online=True, epoch=1)
    restarted = DeviceStatus(online=True, epoch=2)
    for session, back, stays in (("s1", online, True), ("s2", restarted, False)):
        answer(bench, rows, session)
        bench.engine.observe(DEVICE, DeviceStatus(online=False, epoch=0))
        bench.now += 5
        bench.engine.observe(DEVICE, back)
        bench.now += 6
        bench.engine.expire()
        assert names(bench) == ({session} if stays else set())
        bench.send(Close(session))


def test_a_kept_session_expires(bench: Bench) -> None:
    bench.start(session_ttl_s=60)
    answer(bench, bench.upload(NUM_FIRST))
    bench.now += 61
    bench.engine.expire()
    assert bench.open("s2", continues=earlier()) == [opened("s2", 0)]


def test_a_worker_that_stops_refuses_a_continuation_as_any_session(bench: Bench) -> None:
    answer(bench, bench.upload(NUM_FIRST))
    bench.engine.is_draining = True
    (refused,) = bench.open("s2", continues=earlier())
    assert isinstance(refused, Refused)
    assert refused.code == "draining"


def test_thousands_of_continuations_hold_no_more_than_one_session(bench: Bench) -> None:
    rows = bench.upload(NUM_FIRST)
    answer(bench, rows, "s0")
    used_bytes = bench.engine.pool.used_bytes
    for i in range(3000):
        continues = earlier(f"s{i}", num_positions=1 << 20)
        assert bench.open(f"s{i + 1}", continues=continues) == [opened(f"s{i + 1}", NUM_FIRST)]
        assert bench.engine.pool.used_bytes == used_bytes
    assert names(bench) == {"s3000"}
    check_answer(bench, rows, "s3000")


def test_a_session_that_continues_itself_gains_nothing(bench: Bench) -> None:
    rows = bench.upload(NUM_ALL)
    answer(bench, rows[:NUM_FIRST])
    sampling = Sampling(seed=1)
    assert bench.open("s1", continues=earlier(), sampling=sampling) == [opened("s1", NUM_FIRST)]
    assert names(bench) == {"s1"}
    check_answer(bench, rows, "s1")
