"""Messages that come late, twice, or from before a restart change nothing that came since."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from cloud_broker_worker.worker.session import SessionKey
from fleet.protocol.codec import pack_chunk
from fleet.protocol.messages import Close, Context, Gap, Opened, Verified
from tests.cloud_broker_worker.worker.conftest import DEVICE, Bench


def test_an_open_from_before_the_device_started_again_is_ignored(bench: Bench) -> None:
    bench.open(epoch=2)
    rows = bench.upload(6)
    bench.context(rows)
    assert bench.open(epoch=1, max_positions=100) == []
    bench.ask(5)
    assert bench.token().token_id == bench.expected_token(rows)


def test_an_open_that_comes_twice_keeps_the_context_and_the_request(bench: Bench) -> None:
    bench.open()
    rows = bench.upload(6)
    bench.context(rows)
    bench.ask(5)
    (opened,) = bench.open()
    assert isinstance(opened, Opened)
    assert opened.received == 6
    assert bench.token().token_id == bench.expected_token(rows)


def test_a_request_that_was_followed_by_another_is_dropped_and_does_not_displace_it(
    bench: Bench,
) -> None:
    bench.open()
    rows = bench.upload(9)
    bench.context(rows)
    bench.ask(8, request=4)
    assert bench.ask(5, request=3) == []
    token = bench.token()
    assert (token.request, token.token_id) == (4, bench.expected_token(rows))
    assert bench.ask(5, request=3) == []
    assert bench.engine.step() is None


def test_a_request_after_a_rejection_continues_behind_what_was_kept(bench: Bench) -> None:
    bench.open()
    rows = bench.upload(12)
    bench.context(rows)
    wrong = (bench.expected_tokens(rows, 8)[0] + 1) % 384
    bench.verify(8, (wrong, 0, 0))
    assert bench.verdict().accepted == 0
    bench.ask(8, request=1)
    assert bench.token().token_id == bench.expected_token(rows[:9])


def test_a_draft_may_hold_special_tokens_and_is_judged_like_any_other(bench: Bench) -> None:
    bench.open()
    rows = bench.upload(12)
    bench.context(rows)
    end_of_text = bench.whole.model.config.eos_token_id
    (expected,) = bench.expected_tokens(rows[:9], 8)
    bench.verify(8, (end_of_text, end_of_text))
    verdict = bench.verdict()
    assert (verdict.accepted, verdict.token_id) == (
        (0, expected) if expected != end_of_text else (1, expected)
    )


def test_the_time_of_a_request_counts_from_its_arrival(bench: Bench) -> None:
    bench.open()
    bench.ask(5)
    bench.now += 0.25
    bench.context(bench.upload(6))
    assert bench.token().busy_ms == pytest.approx(250.0)


def test_a_request_that_is_repeated_while_it_waits_has_the_later_deadline_and_the_first_arrival(
    bench: Bench,
) -> None:
    bench.open()
    bench.ask(5, deadline_ms=1000)
    bench.now += 0.8
    bench.ask(5, deadline_ms=1000)
    bench.now += 0.8
    bench.context(bench.upload(6))
    assert bench.token().busy_ms == pytest.approx(1600.0)


def test_a_position_beyond_the_session_is_refused_and_the_session_lives(bench: Bench) -> None:
    bench.open(max_positions=10)
    rows = bench.upload(10)
    bench.context(rows)
    (refused,) = bench.ask(10)
    assert getattr(refused, "code", None) == "too_long"
    bench.ask(9, request=1)
    assert bench.token().token_id == bench.expected_token(rows)


def test_context_of_an_earlier_branch_is_dropped_before_it_is_decoded(bench: Bench) -> None:
    bench.open(branch=3)
    broken = replace(pack_chunk(2, 0, bench.upload(4)), crc32=1)
    assert bench.send(Context("s1", broken)) == []
    assert bench.send(Context("s1", replace(broken, branch=3))) == [Gap("s1", 3, 0)]


def test_what_follows_a_close_is_answered_once_each_and_opens_nothing(bench: Bench) -> None:
    bench.open()
    bench.context(bench.upload(4))
    bench.ask(3)
    bench.send(Close("s1"))
    assert bench.engine.step() is None
    (refused,) = bench.ask(3, request=1)
    assert getattr(refused, "code", None) == "unknown_session"
    assert bench.engine.sessions == {}


def test_a_request_expires_alone_and_its_session_answers_the_next(bench: Bench) -> None:
    for session in ("late", "early"):
        bench.open(session)
        bench.context(bench.upload(4), session=session)
    bench.ask(3, session="late", deadline_ms=10)
    bench.ask(3, session="early", deadline_ms=1000)
    bench.now += 0.5
    answers = bench.step()
    assert answers.keys() == {SessionKey(DEVICE, "early")}
    bench.ask(3, request=1, session="late")
    assert isinstance(bench.step()[SessionKey(DEVICE, "late")], Verified)
