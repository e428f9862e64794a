"""Drafts and branches, message by message."""

from __future__ import annotations

import pytest

from fleet.protocol.messages import Gap, Opened, Received, Refused, Sampling, Verified
from tests.cloud_broker_worker.worker.conftest import Bench

NUM_ROWS = 16
START = 9
Tokens = tuple[int, ...]


@pytest.fixture
def expected(bench: Bench) -> Tokens:
    """The whole model's tokens after positions [START, NUM_ROWS), of a session that has them
    all.
    """
    bench.open()
    rows = bench.upload(NUM_ROWS)
    bench.context(rows)
    return bench.expected_tokens(rows, START)


def spoiled(tokens: Tokens, index: int) -> Tokens:
    """A draft whose token number `index` is wrong."""
    return (*tokens[:index], (tokens[index] + 1) % 384, *tokens[index + 1 :])


def test_a_draft_that_is_all_right_is_accepted_and_nothing_is_forgotten(
    bench: Bench, expected: Tokens
) -> None:
    assert bench.verify(START, expected) == []
    verdict = bench.verdict()
    assert (verdict.accepted, verdict.token_id, len(verdict.logprobs)) == (
        len(expected),
        None,
        len(expected),
    )
    session = next(iter(bench.engine.sessions.values()))
    assert (session.branch, session.received, session.length) == (0, NUM_ROWS, NUM_ROWS)


@pytest.mark.parametrize("wrong", range(NUM_ROWS - START))
def test_the_first_wrong_token_is_corrected_and_what_lies_behind_it_is_forgotten(
    bench: Bench, expected: Tokens, wrong: int
) -> None:
    bench.verify(START, spoiled(expected, wrong), request=5)
    verdict = bench.verdict()
    assert (verdict.request, verdict.start, verdict.accepted) == (5, START, wrong)
    assert verdict.token_id == expected[wrong]
    assert len(verdict.logprobs) == wrong + 1
    session = next(iter(bench.engine.sessions.values()))
    assert (session.branch, session.received) == (1, START + wrong + 1)
    assert session.length <= session.received


def test_after_a_rejection_the_next_branch_goes_on(bench: Bench, expected: Tokens) -> None:
    bench.verify(START, spoiled(expected, 2))
    bench.verdict()
    more = bench.upload(NUM_ROWS, seed=4)[START + 3 :]
    assert bench.context(more, start=START + 3, branch=1) == []
    bench.ask(NUM_ROWS - 1, request=1)
    rows = bench.upload(NUM_ROWS).copy()
    rows[START + 3 :] = more
    assert bench.token().token_id == bench.expected_token(rows)


def test_what_belongs_to_an_earlier_branch_is_dropped_silently(
    bench: Bench, expected: Tokens
) -> None:
    bench.verify(START, spoiled(expected, 0))
    bench.verdict()
    assert bench.context(bench.upload(NUM_ROWS)[START + 1 :], start=START + 1, branch=0) == []
    assert bench.step() == {}
    assert next(iter(bench.engine.sessions.values())).received == START + 1


def test_a_device_that_missed_the_rejection_and_asks_anew_has_to_open_again(
    bench: Bench, expected: Tokens
) -> None:
    """As after an `opened` that overtook the verdict, when the device has given its question
    another number.
    """
    bench.verify(START, spoiled(expected, 0))
    verdict = bench.verdict()
    assert bench.verify(START, spoiled(expected, 0)) == [verdict]
    (refused,) = bench.verify(START, spoiled(expected, 0), request=1, branch=0)
    assert isinstance(refused, Refused)
    assert (refused.code, refused.retry_after_ms) == ("unknown_session", 0)
    (opened,) = bench.open(branch=0)
    assert isinstance(opened, Opened)
    assert opened.received == 0


def test_a_branch_that_the_worker_does_not_know_begins_from_nothing(
    bench: Bench, expected: Tokens
) -> None:
    rows = bench.upload(NUM_ROWS)
    assert bench.context(rows[START:], start=START, branch=3) == [Gap("s1", 3, 0)]
    bench.context(rows, branch=3)
    bench.verify(START, expected, branch=3)
    assert bench.verdict().accepted == len(expected)


def test_opening_it_on_another_branch_starts_it_afresh(bench: Bench, expected: Tokens) -> None:
    (opened,) = bench.open(branch=2)
    assert isinstance(opened, Opened)
    assert opened.received == 0
    assert bench.open(branch=2) == [opened]


def test_a_trusted_token_is_accepted_whatever_it_is_and_what_follows_it_is_judged(
    bench: Bench, expected: Tokens
) -> None:
    bench.verify(START, spoiled(expected, 1), trusted=(1,))
    verdict = bench.verdict()
    assert verdict.accepted == len(expected)
    assert verdict.logprobs[1] == 0.0
    bench.verify(START, spoiled(spoiled(expected, 1), 2), request=1, trusted=(1,))
    assert bench.verdict().accepted == 2


def test_a_draft_that_is_trusted_whole_is_accepted_and_the_next_request_is_answered_right(
    bench: Bench, expected: Tokens
) -> None:
    bench.verify(START, spoiled(expected[:-1], 0), trusted=tuple(range(len(expected) - 1)))
    verdict = bench.verdict()
    assert (verdict.accepted, set(verdict.logprobs)) == (len(expected) - 1, {0.0})
    bench.ask(NUM_ROWS - 1, request=1)
    assert bench.token().token_id == expected[-1]


@pytest.mark.parametrize("max_batch_positions", [1, 3, 64])
def test_logits_are_computed_for_judged_tokens_alone(
    bench: Bench, max_batch_positions: int
) -> None:
    bench.start(max_batch_positions=max_batch_positions)
    bench.open()
    rows = bench.upload(NUM_ROWS)
    expected = bench.expected_tokens(rows, START)
    bench.context(rows)
    counted: list[int] = []
    hook = bench.layers._model.lm_head.register_forward_hook(
        lambda _, args, out: counted.append(len(out))
    )
    try:
        bench.verify(START, expected, trusted=(0, 2, 3))
        answers = [message for _ in range(NUM_ROWS) for message in bench.step().values()]
    finally:
        hook.remove()
    (verdict,) = answers
    assert isinstance(verdict, Verified)
    assert verdict.accepted == len(expected)
    assert sum(counted) == len(expected) - 3


def test_the_same_verify_again_gets_the_same_verdict(bench: Bench, expected: Tokens) -> None:
    draft = spoiled(expected, 1)
    bench.verify(START, draft, request=7)
    verdict = bench.verdict()
    assert bench.verify(START, draft, request=7) == [verdict]
    assert next(iter(bench.engine.sessions.values())).branch == 1


def test_a_verify_waits_for_its_context_and_reports_once_what_is_missing(bench: Bench) -> None:
    rows = bench.upload(NUM_ROWS)
    bench.open()
    bench.context(rows[:12])
    draft = bench.expected_tokens(rows, START)
    assert bench.verify(START, draft) == [Gap("s1", 0, 12)]
    assert bench.step() == {}
    bench.context(rows[12:], start=12)
    assert bench.verdict().accepted == len(draft)


def test_a_verify_about_positions_that_have_run_already_runs_them_again(
    bench: Bench, expected: Tokens
) -> None:
    bench.ask(NUM_ROWS - 1)
    bench.token()
    bench.verify(START, expected, request=1)
    assert bench.verdict().accepted == len(expected)


def test_a_verify_is_cut_to_the_batch_and_its_tokens_are_put_together(bench: Bench) -> None:
    bench.start(max_batch_positions=3)
    rows = bench.upload(NUM_ROWS)
    bench.open()
    bench.context(rows)
    draft = bench.expected_tokens(rows, START)
    bench.verify(START, draft)
    while not (answers := bench.step()):
        pass
    (verdict,) = answers.values()
    assert isinstance(verdict, Verified)
    assert verdict.accepted == len(draft)


def test_a_token_outside_the_vocabulary_is_never_right(bench: Bench, expected: Tokens) -> None:
    bench.verify(START, ((1 << 31) - 1, *expected[1:]))
    assert bench.verdict().accepted == 0


def test_sampled_drafts_are_judged_by_the_draw_that_single_requests_get(bench: Bench) -> None:
    rows = bench.upload(NUM_ROWS)
    hot = Sampling(temperature=2.0, seed=11)
    bench.open("other", sampling=hot)
    bench.context(rows[:START], session="other")
    drawn: list[int] = []
    for request, position in enumerate(range(START, NUM_ROWS)):
        bench.context(rows[position : position + 1], start=position, session="other")
        bench.ask(position, request=request, session="other")
        token_id = bench.token("other").token_id
        assert token_id is not None
        drawn.append(token_id)
    bench.open(sampling=hot)
    bench.context(rows)
    bench.verify(START, tuple(drawn))
    assert bench.verdict().accepted == len(drawn)


def test_a_verify_whose_deadline_has_passed_is_dropped(bench: Bench) -> None:
    bench.open()
    bench.verify(START, (1, 2), deadline_ms=1000)
    bench.now += 1.5
    bench.context(bench.upload(NUM_ROWS))
    assert bench.step() == {}


def test_a_draft_longer_than_the_session_is_refused(bench: Bench) -> None:
    bench.open(max_positions=NUM_ROWS)
    (refused,) = bench.verify(NUM_ROWS - 1, (1, 2))
    assert refused.code == "too_long"  # type: ignore[union-attr]


def test_receipts_come_at_the_latest_when_half_the_window_is_out(bench: Bench) -> None:
    bench.start(window_bytes=1024)
    rows = bench.upload(NUM_ROWS)
    bench.open()
    answers = [bench.context(rows[i : i + 1], start=i) for i in range(NUM_ROWS)]
    receipts = [answer[0] for answer in answers if answer]
    assert receipts == [Received("s1", 0, 4 * (i + 1)) for i in range(4)]  # rows of 128 bytes


def test_a_device_that_repeats_context_gets_the_receipt_again_once(bench: Bench) -> None:
    rows = bench.upload(4)
    bench.open()
    bench.context(rows)
    assert bench.context(rows) == [Received("s1", 0, 4)]
    assert bench.context(rows) == []


def test_context_runs_ahead_while_no_request_waits_but_drafts_do_not(bench: Bench) -> None:
    bench.start(run_ahead_positions=5)
    rows = bench.upload(NUM_ROWS)
    bench.open()
    bench.context(rows)
    lengths = []
    while bench.engine.step() is not None:
        lengths.append(next(iter(bench.engine.sessions.values())).length)
    assert lengths == [5, 10, 15]
    bench.verify(START, bench.expected_tokens(rows, START))
    bench.verdict()
    bench.context(bench.upload(NUM_ROWS + 2)[NUM_ROWS:], start=NUM_ROWS)
    assert bench.engine.step() is None
