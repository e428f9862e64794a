"""A worker chooses and accepts only tokens that a session's constraint allows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from cloud_broker_worker.worker.config import WorkerConfig
from cloud_broker_worker.worker.engine import WorkerEngine
from fleet.constraints.grammars import Grammars
from fleet.protocol.codec import TOKEN_DTYPE, pack_chunk
from fleet.protocol.constraint import Constraint
from fleet.protocol.messages import ChoiceRules, Context, Gap, Opened, Refused, Verified
from tests.cloud_broker_worker.worker.conftest import Bench
from tests.tiny import VOCAB_SIZE, make_tiny_tokenizer

PROMPT = np.random.default_rng(0).integers(3, VOCAB_SIZE, 8).tolist()
CONSTRAINT = Constraint("regex", b"(a[bc]){2,3}")
RULES = ChoiceRules(constraint=CONSTRAINT, prompt_length=len(PROMPT))
FORBIDDEN = 300
EOS = 2


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> Grammars:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer().save_pretrained(folder)
    return Grammars(folder / "tokenizer.json", VOCAB_SIZE, (EOS,))


@pytest.fixture
def device(bench: Bench, grammars: Grammars) -> Bench:
    """A device whose worker can apply constraints."""
    config = WorkerConfig(num_threads=1, run_ahead_positions=0)
    bench.engine = WorkerEngine(bench.layers, "worker-1", config, lambda: bench.now, grammars)
    return bench


def open_constrained(device: Bench) -> None:
    (opened,) = device.open(rules=RULES)
    assert isinstance(opened, Opened)


def upload(device: Bench, answer: list[int]) -> None:
    text = PROMPT + answer
    rows = device.whole.upload(text, device.UPLOAD_LAYER)
    assert (
        device.send(Context("s1", pack_chunk(0, 0, rows, tokens=np.array(text, TOKEN_DTYPE)))) == []
    )


def expected_answer(device: Bench, grammars: Grammars) -> list[int]:
    """The whole model's greedy answer under the same mask."""
    rule = grammars.constrain(CONSTRAINT, len(PROMPT))
    answer: list[int] = []
    while EOS not in answer:
        rows = device.whole.upload(PROMPT + answer, device.UPLOAD_LAYER)
        logits = device.whole.logits(rows, device.UPLOAD_LAYER)[-1].clone()
        allowed = rule.allowed(PROMPT + answer)
        assert allowed is not None
        logits[torch.from_numpy(~allowed)] = -torch.inf
        answer.append(int(logits.argmax()))
    return answer


def test_a_whole_draft_is_judged_under_the_mask_of_each_position(
    device: Bench, grammars: Grammars
) -> None:
    answer = expected_answer(device, grammars)
    assert make_tiny_tokenizer().decode(answer[:2]) in ("ab", "ac")
    open_constrained(device)
    upload(device, answer[:-1])
    device.verify(len(PROMPT) - 1, tuple(answer))
    verdict = device.verdict()
    assert (verdict.accepted, verdict.token_id) == (len(answer), None)


def test_a_forbidden_draft_is_replaced_by_the_best_allowed_token_and_the_session_goes_on(
    device: Bench, grammars: Grammars
) -> None:
    answer = expected_answer(device, grammars)
    open_constrained(device)
    upload(device, [answer[0], FORBIDDEN, answer[2]])
    device.verify(len(PROMPT) - 1, (answer[0], FORBIDDEN, answer[2]))
    verdict = device.verdict()
    assert (verdict.accepted, verdict.token_id) == (1, answer[1])
    text = PROMPT + answer[:2]
    rows = device.whole.upload(text, device.UPLOAD_LAYER)[-1:]
    device.send(
        Context("s1", pack_chunk(1, len(text) - 1, rows, tokens=np.array(text[-1:], TOKEN_DTYPE)))
    )
    device.ask(len(text) - 1, request=1)
    assert device.token().token_id == answer[2]


def test_log_probabilities_count_forbidden_tokens(device: Bench) -> None:
    open_constrained(device)
    upload(device, [])
    device.ask(len(PROMPT) - 1)
    verdict = device.token()
    rows = device.whole.upload(PROMPT, device.UPLOAD_LAYER)
    logprobs = device.whole.logits(rows, device.UPLOAD_LAYER)[-1].log_softmax(-1)
    assert verdict.token_id is not None
    assert verdict.logprobs[-1] == pytest.approx(float(logprobs[verdict.token_id]), abs=1e-3)


def test_a_session_without_a_constraint_in_the_same_batch_is_not_changed(device: Bench) -> None:
    open_constrained(device)
    upload(device, [])
    rows = device.upload(9)
    device.open("s2")
    device.context(rows, session="s2")
    device.ask(len(PROMPT) - 1)
    device.ask(8, session="s2")
    tokens = {
        key.session: message.token_id
        for key, message in device.step().items()
        if isinstance(message, Verified)
    }
    assert tokens["s2"] == device.expected_token(rows)
    assert make_tiny_tokenizer().decode([tokens["s1"]]) == "a"


def test_context_without_token_ids_is_asked_for_again(device: Bench) -> None:
    open_constrained(device)
    rows = device.whole.upload(PROMPT, device.UPLOAD_LAYER)
    assert device.send(Context("s1", pack_chunk(0, 0, rows))) == [Gap("s1", 0, 0)]


def test_another_constraint_begins_the_session_again(device: Bench) -> None:
    open_constrained(device)
    upload(device, [])
    other = replace(CONSTRAINT, source=b"x")
    (opened,) = device.open(rules=replace(RULES, constraint=other))
    assert isinstance(opened, Opened)
    assert opened.received == 0


@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        (Constraint("regex", b"("), "unclosed group"),
        (Constraint("json_schema", b"[]"), "object schema"),
        (Constraint("json_schema", b"{"), "schema"),
        (Constraint("regex", b"\xff"), "UTF-8"),
    ],
)
def test_a_constraint_that_cannot_be_applied_is_refused_for_good(
    device: Bench, constraint: Constraint, reason: str
) -> None:
    (refused,) = device.open(rules=replace(RULES, constraint=constraint))
    assert isinstance(refused, Refused)
    assert (refused.code, refused.retry_after_ms) == ("bad_constraint", 0)
    assert reason.lower() in refused.message.lower()


def test_a_worker_without_a_tokenizer_refuses(bench: Bench) -> None:
    (refused,) = bench.open(rules=RULES)
    assert isinstance(refused, Refused)
    assert refused.code == "bad_constraint"
