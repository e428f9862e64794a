"""A step that gives several tokens gives those of single steps."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest

from edge_agent.generation.decoder import MAX_PROPOSALS, Decoder, GeneratedToken
from edge_agent.generation.generator import Generator
from edge_agent.generation.mode_controller import ModeController
from edge_agent.generation.mode_policy import Targets
from edge_agent.generation.proposal_budget import FREE_STEPS, MAX_LOSS, ProposalBudget
from edge_agent.generation.proposer import Proposer
from edge_agent.measurements import Measurements
from fleet.bundles.manifest import Bundle
from fleet.constraints.grammars import Grammars
from fleet.constraints.token_constraint import TokenConstraint
from fleet.graphs.cascade import chunks_are_exact
from fleet.graphs.partition import MAX_EXITS, Float32, Partition
from fleet.protocol.constraint import Constraint
from fleet.protocol.messages import NO_RULES, ChoiceRules, Sampling
from fleet.protocol.modes import Mode
from tests.conftest import MakeTinyBundle
from tests.tiny import VOCAB_SIZE, make_tiny_tokenizer

PROMPT = [5, 9, 300, 17, 42]
NUM_TOKENS = 40
RULES = ChoiceRules(
    prompt_length=len(PROMPT),
    repetition_penalty=1.3,
    frequency_penalty=0.5,
    logit_bias=((200, 3.0),),
    top_logprobs=2,
)


class KnownText:
    """A proposer that knows the text; one token of `wrong_every` is wrong."""

    def __init__(self, token_ids: Sequence[int], wrong_every: int = 7) -> None:
        self.results: list[tuple[int, int]] = []
        self._known = [
            (token_id + 1) % 384 if i % wrong_every == 0 else token_id
            for i, token_id in enumerate(token_ids)
        ]
        self._num_tokens = 0

    def __len__(self) -> int:
        return self._num_tokens

    def extend(self, token_ids: Sequence[int]) -> None:
        self._num_tokens += len(token_ids)

    def truncate(self, num_tokens: int) -> None:
        self._num_tokens = min(self._num_tokens, num_tokens)

    def propose(self, max_tokens: int) -> list[int]:
        return self._known[self._num_tokens : self._num_tokens + max_tokens]

    def chance(self, number: int) -> float:
        return 0.9 if number else 0.8

    def learn(self, num_proposed: int, num_accepted: int) -> None:
        self.results.append((num_proposed, num_accepted))


class FreeChunks(Measurements):
    """Measurements by which a chunk costs no more than a position."""

    def chunk_cost(self, num_positions: int) -> float:
        del num_positions
        return 1.0


@pytest.fixture(scope="module")
def partition(make_tiny_bundle: MakeTinyBundle) -> Partition:
    return Partition(make_tiny_bundle((1, 2), None, None, "balanced"), num_threads=1)


def generate(
    partition: Partition,
    thresholds: tuple[float, ...],
    sampling: Sampling,
    proposer: Proposer | None = None,
    *,
    rules: ChoiceRules = NO_RULES,
    num_tokens: int = NUM_TOKENS,
    constraint: TokenConstraint | None = None,
    eos: tuple[int, ...] = (),
) -> tuple[list[GeneratedToken], Decoder]:
    decoder = Decoder(
        partition,
        len(PROMPT) + num_tokens,
        thresholds,
        sampling,
        measurements=FreeChunks(),
        rules=rules,
        constraint=constraint,
        proposer=proposer,
    )
    modes = ModeController(Mode.STANDALONE, Targets(), Measurements(), 100)
    generator = Generator(decoder, modes, eos)
    return list(generator.generate(PROMPT, num_tokens)), decoder


def assert_same(tokens: list[GeneratedToken], expected: list[GeneratedToken]) -> None:
    """The exit heads are products of float32, which round by the number of their rows."""
    assert [token.token_id for token in tokens] == [token.token_id for token in expected]
    assert [token.source for token in tokens] == [token.source for token in expected]
    for token, other in zip(tokens, expected, strict=True):
        assert token.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert token.confidence == pytest.approx(other.confidence, abs=1e-4)
        assert [token_id for token_id, _ in token.top] == [token_id for token_id, _ in other.top]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.2, seed=3)])
@pytest.mark.parametrize("rules", [NO_RULES, RULES])
@pytest.mark.parametrize("thresholds", [(0.0, 0.0), (1.0, 1.0), (None, 1.0)])
def test_the_answer_is_that_of_single_steps(
    partition: Partition,
    sampling: Sampling,
    rules: ChoiceRules,
    thresholds: tuple[float | None, ...],
) -> None:
    first, _ = generate(partition, (0.0, 0.0), sampling, rules=rules)
    confidences = sorted(token.confidence or 0.0 for token in first)
    middle = confidences[NUM_TOKENS // 2]
    limits = tuple(middle if each is None else each for each in thresholds)
    expected, single = generate(partition, limits, sampling, rules=rules)
    proposer = KnownText([*PROMPT, *(token.token_id for token in expected)])
    tokens, decoder = generate(partition, limits, sampling, proposer, rules=rules)
    assert_same(tokens, expected)
    assert single.num_steps == NUM_TOKENS > 2 * decoder.num_steps
    assert sum(accepted for _, accepted in proposer.results) == NUM_TOKENS - decoder.num_steps
    if None in thresholds:
        assert {token.source for token in tokens} == {"exit:1", "exit:2"}


class Uploads:
    """The positions that a decoder offers for upload, in the place of a session."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []

    def offer(self, hidden_states: Float32, token_ids: Sequence[int]) -> None:
        assert len(hidden_states) == len(token_ids)
        self.token_ids += token_ids


@pytest.mark.parametrize("num_proposed", range(10))
def test_every_position_is_uploaded_with_its_token(partition: Partition, num_proposed: int) -> None:
    expected, _ = generate(partition, (1.0, 1.0), Sampling())
    text = [*PROMPT, *(token.token_id for token in expected)]
    uploads: Any = Uploads()
    decoder = Decoder(
        partition,
        len(text),
        (1.0, 1.0),
        Sampling(),
        uploads,
        measurements=FreeChunks(),
        proposer=KnownText(text, wrong_every=999),
    )
    decoder.text += PROMPT
    decoder.advance(1)
    choices = decoder.advance(num_proposed + 1)
    assert len(choices) == num_proposed + 1
    assert uploads.token_ids == decoder.text[:-1]


def test_wrong_proposals_are_cut_off_in_every_block(partition: Partition) -> None:
    expected, single = generate(partition, (1.0, 1.0), Sampling())
    proposer = KnownText([*PROMPT, *(token.token_id for token in expected)], wrong_every=1)
    tokens, decoder = generate(partition, (1.0, 1.0), Sampling(), proposer)
    assert_same(tokens, expected)
    assert decoder.cascade.num_filled(0) == decoder.cascade.num_filled(1)
    states = decoder.cascade.hidden_states(1, 0)
    assert (states == single.cascade.hidden_states(1, 0)).all()


@pytest.mark.parametrize("num_tokens", [1, 2, 5])
def test_an_answer_has_no_more_tokens_than_were_asked_for(
    partition: Partition, num_tokens: int
) -> None:
    expected, _ = generate(partition, (0.0, 0.0), Sampling())
    proposer = KnownText([*PROMPT, *(token.token_id for token in expected)], wrong_every=99)
    tokens, _ = generate(partition, (0.0, 0.0), Sampling(), proposer, num_tokens=num_tokens)
    assert_same(tokens, expected[:num_tokens])


def test_a_long_backlog_of_a_deeper_block_does_not_part_the_proposals(
    partition: Partition,
) -> None:
    decoder = Decoder(partition, 400, (0.0, 1.0), Sampling(), measurements=FreeChunks())
    decoder.text += [i % 384 for i in range(260)]
    decoder.advance(1)
    num_positions = len(decoder.text)
    deep = Decoder(partition, 400, (1.0, 1.0), Sampling())
    deep.text += decoder.text
    expected = [deep.advance(1)[0].token_id for _ in range(8)]
    decoder._thresholds = (1.0, 1.0)
    decoder._proposer = KnownText([*decoder.text, *expected], wrong_every=999)
    choices = decoder.advance(8)
    assert decoder.cascade.num_filled(1) == num_positions + len(choices) - 1
    assert [choice.token_id for choice in choices] == expected[: len(choices)]


def test_proposals_stop_when_they_have_cost_more_than_they_may() -> None:
    budget = ProposalBudget()
    num_wrong = 0
    for _ in range(1000):
        num_wrong += not budget.is_spent
        budget.count(1, 1.0 if budget.is_spent else 1.5)
    assert 0.5 * num_wrong <= FREE_STEPS + MAX_LOSS * 1000 + 0.5


def test_right_proposals_keep_the_budget_open() -> None:
    budget = ProposalBudget()
    for _ in range(100):
        budget.count(4, 2.0)
    budget.count(1, 100.0)
    assert not budget.is_spent


def test_on_this_machine_a_chunk_has_the_bits_of_single_positions(partition: Partition) -> None:
    work = list(partition.work.positions)
    assert chunks_are_exact(partition)
    assert partition.work.positions == work


def earlier_bundle(bundle: Bundle, folder: Path) -> Bundle:
    """Return a copy of a bundle with graphs that give one exit a run."""
    shutil.copytree(bundle.folder, folder)
    last = onnx.helper.make_node("Gather", ["every_exit", "last"], ["one_exit"], axis=0)
    axis = onnx.helper.make_node("Unsqueeze", ["one_exit", "axis"], ["exit_hidden"])
    for path in folder.glob("edge/block_*.onnx"):
        model = onnx.load(path)
        for node in model.graph.node:
            node.output[:] = ["every_exit" if x == "exit_hidden" else x for x in node.output]
        for name, value in (("last", -1), ("axis", 0)):
            dims = [] if name == "last" else [1]
            tensor = onnx.helper.make_tensor(name, onnx.TensorProto.INT64, dims, [value])
            model.graph.initializer.append(tensor)
        model.graph.node.extend([last, axis])
        set_one_row(model.graph.output, "exit_hidden")
        onnx.save_model(model, path)
    model = onnx.load(folder / "edge/lm_head.onnx")
    set_one_row(model.graph.input, "exit_hidden")
    onnx.save_model(model, folder / "edge/lm_head.onnx")
    return Bundle(folder, bundle.manifest)


def set_one_row(values: Sequence[onnx.ValueInfoProto], name: str) -> None:
    value = next(value for value in values if value.name == name)
    value.type.tensor_type.shape.dim[0].dim_value = 1


def test_graphs_of_an_earlier_version_give_one_token_a_step(
    make_tiny_bundle: MakeTinyBundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = make_tiny_bundle((1, 2), None, None, "balanced")
    with caplog.at_level(logging.INFO):
        earlier = Partition(earlier_bundle(bundle, tmp_path / "earlier"), num_threads=1)
    assert [record.getMessage() for record in caplog.records] == [
        f"bundle {bundle.manifest.bundle_id} was made by an earlier version: each step of this "
        "device gives one token; export the bundle again for several"
    ]
    expected, _ = generate(Partition(bundle, num_threads=1), (0.5, 1.0), Sampling())
    proposer = KnownText([*PROMPT, *(token.token_id for token in expected)])
    tokens, decoder = generate(earlier, (0.5, 1.0), Sampling(), proposer)
    assert not decoder.checks_proposals
    assert decoder.num_steps == NUM_TOKENS
    assert_same(tokens, expected)


def test_a_constraint_allows_the_same_tokens(partition: Partition, tmp_path: Path) -> None:
    make_tiny_tokenizer().save_pretrained(tmp_path)
    grammars = Grammars(tmp_path / "tokenizer.json", VOCAB_SIZE, (2,))
    constraint = Constraint("regex", b"(a[bc]){4,9}")

    def constrained(proposer: KnownText | None) -> tuple[list[GeneratedToken], Decoder]:
        rules = ChoiceRules(constraint=constraint, prompt_length=len(PROMPT))
        token_constraint = grammars.constrain(constraint, len(PROMPT))
        return generate(
            partition,
            (0.5, 1.0),
            Sampling(),
            proposer,
            rules=rules,
            num_tokens=16,
            constraint=token_constraint,
            eos=(2,),
        )

    expected, _ = constrained(None)
    tokens, decoder = constrained(KnownText([*PROMPT, *(token.token_id for token in expected)]))
    assert_same(tokens, expected)
    assert decoder.num_steps < len(tokens)


def test_proposals_fit_the_exits_that_a_run_keeps(partition: Partition) -> None:
    expected, _ = generate(partition, (1.0, 1.0), Sampling(), num_tokens=64)
    proposer = KnownText([*PROMPT, *(token.token_id for token in expected)], wrong_every=999)
    tokens, _ = generate(partition, (1.0, 1.0), Sampling(), proposer, num_tokens=64)
    assert_same(tokens, expected)
    assert max(proposed for proposed, _ in proposer.results) == MAX_PROPOSALS < MAX_EXITS
