"""The worker's rules, message by message, without a network or a clock."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from cloud_broker_worker.worker.session import SessionKey
from fleet.protocol.codec import pack_chunk
from fleet.protocol.hidden_states import CONTEXT_DTYPES, Float16
from fleet.protocol.messages import (
    Close,
    Context,
    Gap,
    Opened,
    Refused,
    Sampling,
    ToDevice,
    Verified,
    Verify,
)
from tests.cloud_broker_worker.worker.conftest import DEVICE, OUTSIDE, Bench


def refusal(messages: list[ToDevice]) -> Refused:
    (message,) = messages
    assert isinstance(message, Refused), message
    return message


def opened(received: int) -> Opened:
    return Opened(
        session="s1",
        worker="worker-1",
        received=received,
        max_chunk_bytes=96 * 1024,
        window_bytes=1 << 20,
        dtypes=CONTEXT_DTYPES,
    )


# open


def test_a_session_is_opened_and_opening_it_again_says_what_has_arrived(bench: Bench) -> None:
    assert bench.open() == [opened(0)]
    bench.context(bench.upload(5))
    assert bench.open(deadline_ms=7) == [opened(5)]


def test_an_open_on_other_terms_starts_the_session_afresh(bench: Bench) -> None:
    bench.open()
    bench.context(bench.upload(5))
    assert bench.open(epoch=2, max_positions=100) == [opened(0)]
    assert bench.engine.sessions[SessionKey(DEVICE, "s1")].capacity == 100


def test_another_bundle_is_refused_naming_both(bench: Bench) -> None:
    refused = refusal(bench.open(bundle_id="f" * 32))
    assert (refused.code, refused.retry_after_ms) == ("bundle_mismatch", 0)
    assert "f" * 32 in refused.message
    assert bench.layers.manifest.bundle_id in refused.message


@pytest.mark.parametrize(("protocol", "older"), [(3, "device"), (6, "worker")])
def test_another_protocol_is_refused_in_one_line_that_names_the_side_to_update(
    bench: Bench, protocol: int, older: str
) -> None:
    refused = refusal(bench.open(protocol=protocol))
    assert (refused.code, refused.retry_after_ms) == ("protocol_mismatch", 0)
    assert refused.message == (
        f"the worker speaks protocols 4 to 5, the device protocol {protocol}: update the {older}"
    )


@pytest.mark.parametrize("positions", [513, 1 << 20])
def test_a_session_longer_than_the_model_is_refused(bench: Bench, positions: int) -> None:
    refused = refusal(bench.open(max_positions=positions))
    assert (refused.code, refused.retry_after_ms) == ("too_long", 0)
    assert f"at most 512 positions, got {positions}" in refused.message


def test_a_session_larger_than_the_whole_budget_is_refused_for_good(bench: Bench) -> None:
    bench.start(kv_budget_bytes=bench.session_bytes(20))
    refused = refusal(bench.open(max_positions=21))
    assert (refused.code, refused.retry_after_ms) == ("busy", 0)
    assert isinstance(bench.open(max_positions=20)[0], Opened)


def test_two_devices_may_call_their_sessions_the_same(bench: Bench) -> None:
    for i, device in enumerate(("edge-1", "edge-2")):
        bench.open(device=device)
        bench.context(bench.upload(6, seed=i), device=device)
        bench.ask(5, device=device)
    responses = bench.step()
    for i, device in enumerate(("edge-1", "edge-2")):
        token = responses[SessionKey(device, "s1")]
        assert isinstance(token, Verified)
        assert token.token_id == bench.expected_token(bench.upload(6, seed=i))


# context


def test_a_request_is_answered_with_the_whole_models_token_and_its_log_probability(
    bench: Bench,
) -> None:
    rows = bench.upload(12)
    bench.open()
    assert bench.context(rows) == []
    assert bench.ask(11, request=3) == []
    token = bench.token()
    logprobs = bench.whole.logits(rows, bench.UPLOAD_LAYER)[-1].log_softmax(-1)
    assert (token.request, token.start, token.token_id) == (3, 11, int(logprobs.argmax()))
    assert token.logprobs[-1] == pytest.approx(float(logprobs.max()), abs=1e-4)


def test_a_whole_answer_token_by_token_is_the_whole_models(bench: Bench) -> None:
    rows = bench.upload(30)
    bench.open()
    bench.context(rows[:10])
    for position in range(9, 29):
        bench.ask(position, request=position)
        assert bench.token().token_id == bench.expected_token(rows[: position + 1])
        bench.context(rows[position + 1 : position + 2], start=position + 1)


def test_a_hole_is_reported_once_until_there_is_progress(bench: Bench) -> None:
    rows = bench.upload(20)
    bench.open()
    bench.context(rows[:5])
    assert bench.context(rows[8:10], start=8) == [Gap("s1", 0, 5)]
    assert bench.context(rows[10:12], start=10) == []
    assert bench.context(rows[5:7], start=5) == []
    assert bench.context(rows[12:14], start=12) == [Gap("s1", 0, 7)]


def test_every_request_that_waits_for_missing_positions_reports_them(bench: Bench) -> None:
    rows = bench.upload(10)
    bench.open()
    bench.context(rows[:4])
    assert bench.ask(9) == [Gap("s1", 0, 4)]
    assert bench.ask(9) == [Gap("s1", 0, 4)]
    assert bench.step() == {}
    bench.context(rows[4:], start=4)
    assert bench.token().token_id == bench.expected_token(rows)


def test_duplicates_and_overlaps_add_only_what_is_new(bench: Bench) -> None:
    rows = bench.upload(10)
    bench.open()
    for start, stop in ((0, 6), (0, 6), (2, 5), (4, 10), (0, 10)):
        assert not any(
            isinstance(answer, Gap) for answer in bench.context(rows[start:stop], start=start)
        )
    assert bench.engine.sessions[SessionKey(DEVICE, "s1")].received == 10
    bench.ask(9)
    assert bench.token().token_id == bench.expected_token(rows)


def test_a_duplicate_with_other_values_does_not_change_what_arrived_first(bench: Bench) -> None:
    rows = bench.upload(10)
    bench.open()
    bench.context(rows)
    bench.context(bench.upload(10, seed=1))
    bench.ask(9)
    assert bench.token().token_id == bench.expected_token(rows)


@pytest.mark.parametrize(
    "changes",
    [{"crc32": 1}, {"dtype": "float32"}, {"data": b"\x00" * 10}, {"count": 3}],
    ids=["checksum", "dtype", "size", "count"],
)
def test_a_spoiled_context_is_not_taken_and_is_asked_for_again(
    bench: Bench, changes: dict[str, Any]
) -> None:
    rows = bench.upload(8)
    bench.open()
    assert bench.send(Context("s1", replace(pack_chunk(0, 0, rows), **changes))) == [
        Gap("s1", 0, 0)
    ]
    assert bench.context(rows) == []
    bench.ask(7)
    assert bench.token().token_id == bench.expected_token(rows)


def test_hidden_states_that_are_not_finite_are_not_taken(bench: Bench) -> None:
    rows = bench.upload(8)
    rows[3, 5] = np.inf
    bench.open()
    assert bench.context(rows) == [Gap("s1", 0, 0)]


def test_context_beyond_what_was_opened_is_refused_and_the_rest_serves_on(bench: Bench) -> None:
    rows = bench.upload(12)
    bench.open(max_positions=10)
    bench.context(rows[:9])
    refused = refusal(bench.context(rows[9:], start=9))
    text = "expected at most 10 positions, got 12; open a larger session"
    assert (refused.code, refused.message) == ("too_long", text)
    bench.ask(8)
    assert bench.token().token_id == bench.expected_token(rows[:9])


@pytest.mark.parametrize(
    "message",
    [
        Verify(session="s9", request=0, branch=0, start=0, draft=(1,), deadline_ms=100),
        Context("s9", pack_chunk(0, 0, np.zeros((1, 64), np.float16))),
    ],
)
def test_a_session_that_was_not_opened_is_unknown(bench: Bench, message: Verify | Context) -> None:
    assert refusal(bench.send(message)).code == "unknown_session"


# verify


def request_with_context(rows: Float16) -> Verify:
    """Return a request for the token after the last of `rows` that brings them from position 8
    on.
    """
    return Verify(
        session="s1",
        request=0,
        branch=0,
        start=len(rows) - 1,
        draft=(OUTSIDE,),
        deadline_ms=1000,
        chunk=pack_chunk(0, 8, rows[8:]),
    )


def test_a_request_may_bring_its_context(bench: Bench) -> None:
    rows = bench.upload(12)
    bench.open()
    bench.context(rows[:8])
    message = request_with_context(rows)
    assert bench.send(message) == []
    token = bench.token()
    assert token.token_id == bench.expected_token(rows)
    assert bench.send(message)[-1] == token  # sent again


def test_context_that_comes_with_a_request_and_behind_a_hole_gives_one_gap(bench: Bench) -> None:
    rows = bench.upload(12)
    bench.open()
    bench.context(rows[:4])
    assert bench.send(request_with_context(rows)) == [Gap("s1", 0, 4)]
    bench.context(rows[4:], start=4)
    assert bench.token().token_id == bench.expected_token(rows)


def test_the_same_request_again_gets_the_same_answer_without_running_again(bench: Bench) -> None:
    bench.open(sampling=Sampling(temperature=1.5, seed=7))
    bench.context(bench.upload(8))
    bench.ask(7, request=4)
    token = bench.token()
    assert bench.ask(7, request=4) == [token]
    assert bench.engine.step() is None


def test_a_request_that_is_sent_twice_before_its_answer_is_answered_once(bench: Bench) -> None:
    bench.open()
    bench.context(bench.upload(8))
    bench.ask(7)
    bench.ask(7)
    bench.token()
    assert bench.step() == {}


def test_a_new_request_for_an_earlier_position_gets_that_positions_token(bench: Bench) -> None:
    rows = bench.upload(20)
    bench.open()
    bench.context(rows)
    for request, position in enumerate((19, 12, 19)):
        bench.verify(position, (bench.expected_token(rows[: position + 1]),), request=request)
        verdict = bench.verdict()
        assert (verdict.request, verdict.start, verdict.accepted) == (request, position, 1)


def test_a_sampled_token_depends_on_seed_and_position_alone(bench: Bench) -> None:
    drawn = []
    for session, seed in (("s1", 7), ("s2", 7), ("s3", 8), ("s4", 9), ("s5", 10)):
        bench.open(session, sampling=Sampling(temperature=5.0, seed=seed))
        bench.context(bench.upload(8), session=session)
        bench.ask(7, session=session)
        drawn.append(bench.token(session).token_id)
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


def test_a_request_whose_deadline_has_passed_is_dropped_silently(bench: Bench) -> None:
    bench.open()
    bench.ask(7, deadline_ms=1000)
    bench.now += 1.5
    bench.context(bench.upload(8))
    assert bench.step() == {}
    bench.ask(7, request=1)
    assert bench.token().request == 1


# batches


def test_all_sessions_with_a_ready_request_run_in_one_step_and_the_others_do_not(
    bench: Bench,
) -> None:
    for i in range(4):
        bench.open(f"s{i}")
        bench.context(bench.upload(3 + i, seed=i), session=f"s{i}")
    for i in range(3):
        bench.ask(2 + i, session=f"s{i}")
    responses = bench.step()
    assert {key.session for key in responses} == {"s0", "s1", "s2"}
    for i in range(3):
        token = responses[SessionKey(DEVICE, f"s{i}")]
        assert isinstance(token, Verified)
        assert token.token_id == bench.expected_token(bench.upload(3 + i, seed=i))
    assert bench.engine.sessions[SessionKey(DEVICE, "s3")].length == 0


def test_a_long_prefill_is_cut_and_does_not_delay_short_requests(bench: Bench) -> None:
    bench.start(max_batch_positions=16)
    long = bench.upload(60)
    short = bench.upload(2, seed=1)
    bench.open("long")
    bench.context(long, session="long")
    bench.ask(59, session="long")
    bench.open("short")
    bench.context(short, session="short")
    bench.ask(1, session="short")
    assert bench.token("short").token_id == bench.expected_token(short)
    steps = 1
    while not (responses := bench.step()):
        steps += 1
    token = responses[SessionKey(DEVICE, "long")]
    assert isinstance(token, Verified)
    assert token.token_id == bench.expected_token(long)
    assert steps == 3  # 14 + 16 + 16 before the last 14


# memory and time


def test_a_session_that_is_not_used_expires_and_one_in_use_stays(bench: Bench) -> None:
    bench.start(session_ttl_s=60)
    bench.open("old")
    bench.open("used")
    bench.now += 50
    bench.context(bench.upload(3), session="used")
    bench.now += 50
    bench.engine.expire()
    assert {key.session for key in bench.engine.sessions} == {"used"}
    assert refusal(bench.context(bench.upload(3), session="old")).code == "unknown_session"


def test_a_closed_session_gives_its_memory_back_and_closing_twice_is_no_error(bench: Bench) -> None:
    bench.open()
    assert bench.send(Close("s1")) == []
    assert bench.send(Close("s1")) == []
    assert bench.engine.pool.used_bytes == 0


def ask(
    bench: Bench,
    session: str,
    seed: int,
    request: int = 0,
    device: str = DEVICE,
    num_rows: int = 12,
) -> None:
    """Uploads a session's rows, where they are not there yet, and asks for the token after the
    last.
    """
    bench.context(bench.upload(num_rows, seed=seed), session=session, device=device)
    bench.ask(num_rows - 1, request=request, session=session, device=device)


def test_an_evicted_session_keeps_its_context_and_its_cache_is_built_again(bench: Bench) -> None:
    shape = bench.engine.pool.shape
    bench.start(kv_budget_bytes=64 * shape.cache_bytes + 2 * 64 * shape.hidden_bytes)
    for session, seed in (("a", 1), ("b", 2)):
        bench.open(session)
        ask(bench, session, seed)
        assert bench.token(session).token_id == bench.expected_token(bench.upload(12, seed=seed))
        bench.now += 100
    caches = {key.session: s.lease is not None for key, s in bench.engine.sessions.items()}
    assert caches == {"a": False, "b": True}
    bench.ask(11, request=1, session="a")
    assert bench.token("a").token_id == bench.expected_token(bench.upload(12, seed=1))
    bench.engine.check_integrity()


def test_the_least_recently_used_idle_cache_goes_first(bench: Bench) -> None:
    shape = bench.engine.pool.shape
    bench.start(
        kv_budget_bytes=2 * 64 * shape.cache_bytes + 3 * 64 * shape.hidden_bytes,
        max_device_share=1.0,
    )
    for session in ("a", "b"):
        bench.open(session)
        ask(bench, session, 1)
        bench.step()
        bench.now += 1
    bench.ask(11, request=1, session="a")
    bench.step()
    bench.now += 100
    bench.open("c", device="edge-2")
    ask(bench, "c", 3, device="edge-2")
    assert bench.token("c", "edge-2").token_id == bench.expected_token(bench.upload(12, seed=3))
    assert {key.session for key, s in bench.engine.sessions.items() if s.lease} == {"a", "c"}


def test_a_device_over_its_share_loses_its_own_caches_first(bench: Bench) -> None:
    shape = bench.engine.pool.shape
    bench.start(
        kv_budget_bytes=3 * 64 * shape.cache_bytes + 4 * 64 * shape.hidden_bytes,
        max_device_share=0.4,
    )
    for session, device in (("other", "edge-2"), ("a", DEVICE), ("b", DEVICE)):
        bench.open(session, device=device)
        ask(bench, session, 1, device=device)
        bench.step()
        bench.now += 20
    bench.open("c")
    ask(bench, "c", 3)
    bench.token("c")
    assert {key.session for key, s in bench.engine.sessions.items() if s.lease} == {
        "other",
        "b",
        "c",
    }


def test_a_thousand_sessions_leave_nothing_behind(bench: Bench) -> None:
    bench.start(kv_budget_bytes=bench.session_bytes(64 * 4), session_ttl_s=5.0, idle_after_s=1.0)
    rows = bench.upload(4)
    for i in range(1000):
        session = f"s{i}"
        bench.open(session, device=f"edge-{i % 7}")
        bench.context(rows, session=session, device=f"edge-{i % 7}")
        bench.ask(3, session=session, device=f"edge-{i % 7}")
        bench.step()
        if i % 3:
            bench.send(Close(session), device=f"edge-{i % 7}")
        bench.now += 1.5
        bench.engine.expire()
        assert len(bench.engine.sessions) <= 5
        bench.engine.check_integrity()
    bench.now += 10
    bench.engine.expire()
    assert bench.engine.pool.used_bytes == 0


def test_sessions_in_use_are_not_evicted_and_the_newcomer_learns_when_to_try_again(
    bench: Bench,
) -> None:
    bench.start(kv_budget_bytes=bench.session_bytes(64 * 2), retry_after_ms=700)
    bench.open("waits")
    bench.context(bench.upload(3), session="waits")
    bench.ask(5, session="waits", deadline_ms=600_000)
    bench.now += 100
    bench.open("fresh", device="edge-2")
    bench.context(bench.upload(3), session="fresh", device="edge-2")
    refused = refusal(bench.open("new", device="edge-3"))
    assert (refused.code, refused.retry_after_ms) == ("busy", 700)
    assert {key.session for key in bench.engine.sessions} == {"waits", "fresh"}


def test_no_session_is_evicted_when_that_would_not_be_enough(bench: Bench) -> None:
    bench.start(kv_budget_bytes=bench.session_bytes(64 * 3))
    bench.open("idle")
    bench.context(bench.upload(3), session="idle")
    bench.now += 100
    for session in ("busy", "large"):
        bench.open(session, max_positions=128)
    assert bench.context(bench.upload(128), session="busy") == []
    assert refusal(bench.context(bench.upload(128), session="large")).code == "busy"
    assert {key.session for key in bench.engine.sessions} == {"idle", "busy"}
    bench.engine.check_integrity()


def test_a_device_has_its_share_of_sessions_and_others_keep_theirs(bench: Bench) -> None:
    bench.start(max_sessions_per_device=2)
    bench.open("a")
    bench.open("b")
    assert refusal(bench.open("c")).code == "busy"
    assert isinstance(bench.open("c", device="edge-2")[0], Opened)
    bench.now += 100
    assert isinstance(bench.open("c")[0], Opened)
    assert {tuple(key) for key in bench.engine.sessions} == {
        ("edge-1", "b"),
        ("edge-1", "c"),
        ("edge-2", "c"),
    }


# failures


def test_only_the_cause_of_a_failed_batch_is_abandoned(bench: Bench) -> None:
    for session in ("sick", "beside"):
        bench.open(session)
        bench.context(bench.upload(4)[:3], session=session)
        bench.ask(2, session=session)
    bench.step()
    sick = bench.engine.sessions[SessionKey(DEVICE, "sick")]
    assert sick.lease
    sick.lease.layers = tuple(layer.transpose(2, 3) for layer in sick.lease.layers)
    for session in ("sick", "beside"):
        bench.context(bench.upload(4)[3:], start=3, session=session)
        bench.ask(3, request=1, session=session)
    responses = bench.step()
    refused, token = (responses[SessionKey(DEVICE, session)] for session in ("sick", "beside"))
    assert isinstance(refused, Refused)
    assert refused.code == "internal"
    assert isinstance(token, Verified)
    assert token.token_id == bench.expected_token(bench.upload(4))


def test_a_batch_that_fails_when_its_caches_are_written_runs_the_same_positions_again(
    bench: Bench,
) -> None:
    bench.start(max_batch_positions=8)  # two batches for 8 positions of each session
    rows = bench.upload(8)
    for session in ("s1", "s2"):
        bench.open(session)
        bench.context(rows, session=session)
        bench.ask(7, session=session)

    def fail(*_: object) -> None:
        failing.remove()
        raise MemoryError("no room for the logits")

    failing = bench.layers._model.lm_head.register_forward_pre_hook(fail)
    assert bench.step() == {}
    assert {session.length for session in bench.engine.sessions.values()} == {4}
    responses = bench.step()
    for session in ("s1", "s2"):
        token = responses[SessionKey(DEVICE, session)]
        assert isinstance(token, Verified)
        assert token.token_id == bench.expected_token(rows)


def test_a_session_without_finite_logits_is_refused_alone(bench: Bench) -> None:
    for session in ("sick", "beside"):
        bench.open(session, sampling=Sampling(temperature=1.0))
        bench.context(bench.upload(4)[:3], session=session)
        bench.ask(2, session=session)
    bench.step()
    sick_lease = bench.engine.sessions[SessionKey(DEVICE, "sick")].lease
    assert sick_lease
    for layer in sick_lease.layers:
        layer[1].fill_(torch.nan)
    for session in ("sick", "beside"):
        bench.context(bench.upload(4)[3:], start=3, session=session)
        bench.ask(3, request=1, session=session)
    responses = bench.step()
    sick = responses[SessionKey(DEVICE, "sick")]
    beside = responses[SessionKey(DEVICE, "beside")]
    assert isinstance(sick, Refused)
    assert (sick.code, "not finite" in sick.message) == ("internal", True)
    assert isinstance(beside, Verified)
