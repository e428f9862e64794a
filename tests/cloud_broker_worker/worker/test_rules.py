"""The rules of a session on the worker, message by message."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from fleet.protocol.choice_rules import adjust_logits
from fleet.protocol.codec import TOKEN_DTYPE, pack_chunk
from fleet.protocol.hidden_states import Float16
from fleet.protocol.messages import NO_RULES, ChoiceRules, Context, Gap, Refused, ToDevice
from tests.cloud_broker_worker.worker.conftest import DEVICE, Bench

NUM_ROWS = 16
START = 9
TEXT = [*range(10, 10 + START), *([17] * (NUM_ROWS - START))]
RULES = ChoiceRules(
    repetition_penalty=3.0,
    frequency_penalty=2.0,
    logit_bias=((17, 4.0), (300, 5.0)),
    prompt_length=START,
)


def send(bench: Bench, rows: Float16, text: Sequence[int] | None, start: int = 0) -> list[ToDevice]:
    tokens = None if text is None else np.array(text, TOKEN_DTYPE)
    branch = bench.branch("s1", DEVICE)
    return bench.send(Context("s1", pack_chunk(branch, start, rows, tokens=tokens)))


def expected(bench: Bench, rows: Float16, rules: ChoiceRules = RULES) -> tuple[int, ...]:
    """Return the whole model's tokens after positions [START, n) under the rules."""
    logits = bench.whole.logits(rows, bench.UPLOAD_LAYER).numpy()
    every = np.arange(logits.shape[1])
    return tuple(
        int(adjust_logits(every, logits[i], rules, TEXT[: i + 1]).argmax())
        for i in range(START, len(rows))
    )


def test_each_token_of_a_draft_is_chosen_after_the_tokens_before_it(bench: Bench) -> None:
    bench.open(rules=RULES)
    rows = bench.upload(NUM_ROWS)
    send(bench, rows, TEXT)
    draft = expected(bench, rows)
    assert draft != expected(bench, rows, NO_RULES)
    bench.verify(START, draft)
    assert bench.verdict().accepted == len(draft)


def test_after_a_rejection_the_dropped_tokens_do_not_count(bench: Bench) -> None:
    bench.open(rules=RULES)
    rows = bench.upload(NUM_ROWS)
    send(bench, rows, [*TEXT[: START + 1], *([40] * (NUM_ROWS - START - 1))])
    first = expected(bench, rows)[0]
    bench.verify(START, ((first + 1) % 384, *([40] * 6)))
    assert bench.verdict().token_id == first
    send(bench, rows[START + 1 :], TEXT[START + 1 :], start=START + 1)
    draft = expected(bench, rows)[1:]
    bench.verify(START + 1, draft, request=1)
    assert bench.verdict().accepted == len(draft)


@pytest.mark.parametrize("text", [None, TEXT[1:], [*TEXT[1:], 384]])
def test_positions_without_their_tokens_are_dropped_where_the_rules_need_them(
    bench: Bench, text: list[int] | None
) -> None:
    bench.open(rules=RULES)
    (gap,) = send(bench, bench.upload(NUM_ROWS), text)
    assert isinstance(gap, Gap)
    assert gap.expected == 0


def test_a_bias_needs_no_tokens(bench: Bench) -> None:
    rules = ChoiceRules(logit_bias=((300, 100.0),))
    bench.open(rules=rules)
    bench.context(bench.upload(NUM_ROWS))
    bench.verify(START, (300,) * (NUM_ROWS - START))
    assert bench.verdict().accepted == NUM_ROWS - START


def test_a_bias_of_no_token_is_refused(bench: Bench) -> None:
    (refused,) = bench.open(rules=ChoiceRules(logit_bias=((3, 1.0), (384, 1.0))))
    assert isinstance(refused, Refused)
    assert (refused.code, refused.retry_after_ms) == ("unknown_token", 0)
    assert "token ids below 384, got 384" in refused.message


def test_an_open_with_other_rules_starts_the_session_afresh(bench: Bench) -> None:
    bench.open(rules=RULES)
    send(bench, bench.upload(5), TEXT[:5])
    (opened,) = bench.open(rules=ChoiceRules(min_p=0.5))
    assert opened.received == 0  # type: ignore[union-attr]


def test_a_verdict_has_the_best_tokens_of_each_choice(bench: Bench) -> None:
    bench.open(rules=ChoiceRules(top_logprobs=3, logit_bias=((300, 100.0),)))
    rows = bench.upload(NUM_ROWS)
    bench.context(rows)
    bench.verify(START, (300, 300, 7), trusted=(1,))
    verdict = bench.verdict()
    logprobs = bench.whole.logits(rows, bench.UPLOAD_LAYER).log_softmax(-1)
    assert verdict.accepted == 2
    assert isinstance(verdict.top, tuple)
    assert [len(top) for top in verdict.top] == [3, 0, 3]
    for position, index in ((START, 0), (START + 2, 2)):
        best, ids = logprobs[position].topk(3)
        top = verdict.top[index]
        assert [token_id for token_id, _ in top] == ids.tolist()
        torch.testing.assert_close(
            torch.tensor([logprob for _, logprob in top]), best, atol=1e-3, rtol=0
        )
        got = verdict.logprobs[index]
        assert got == pytest.approx(float(logprobs[position, 300]), abs=1e-3)


def test_sessions_with_and_without_rules_share_a_batch(bench: Bench) -> None:
    rows = bench.upload(NUM_ROWS)
    plain = bench.expected_tokens(rows, START)
    bench.open(rules=RULES)
    bench.open("plain")
    send(bench, rows, TEXT)
    bench.context(rows, session="plain")
    ruled = expected(bench, rows)
    bench.verify(START, ruled)
    bench.verify(START, plain, session="plain")
    verdicts = bench.step().values()
    assert [verdict.accepted for verdict in verdicts] == [len(ruled), len(plain)]  # type: ignore[union-attr]
