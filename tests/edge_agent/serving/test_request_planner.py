"""Plans of requests, and requests that are refused before any work."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edge_agent.config import AgentConfig
from edge_agent.engine.control_tokens import ControlTokens
from edge_agent.engine.tokenizer import ChatTokenizer
from edge_agent.serving.request_planner import MB, RequestPlanner
from fleet.bundles.manifest import Bundle
from fleet.errors import PromptError
from fleet.graphs.cascade import Cascade
from fleet.graphs.partition import Partition
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import PromptRequest
from tests.tiny import make_tiny_tokenizer

POSITIONS = 64
SHORT = PromptRequest(prompt="x")
LONG = PromptRequest(prompt="x" * POSITIONS)


@pytest.fixture(scope="module")
def partition(tiny_bundle: Bundle) -> Partition:
    return Partition(tiny_bundle, num_threads=1)


@pytest.fixture(scope="module")
def planner(partition: Partition, tiny_bundle: Bundle) -> RequestPlanner:
    config = AgentConfig(max_positions=POSITIONS, max_new_tokens=1000, thresholds=(0.5, 0.25))
    return RequestPlanner(partition, ChatTokenizer(tiny_bundle), config)


def test_a_prompt_without_a_length_gets_all_available_positions(
    planner: RequestPlanner, partition: Partition
) -> None:
    plan = planner.plan(SHORT)
    assert plan.capacity == POSITIONS
    assert plan.num_bytes == Cascade.num_bytes(partition, POSITIONS)
    assert (plan.mode, plan.thresholds) == (Mode.COLLABORATIVE, (0.5, 0.25))


def test_options_of_the_request_take_precedence_over_settings(planner: RequestPlanner) -> None:
    plan = planner.plan(
        PromptRequest(prompt="x", max_new_tokens=3, mode=Mode.STANDALONE, threshold=0.75)
    )
    assert (plan.max_new_tokens, plan.mode, plan.thresholds) == (3, Mode.STANDALONE, (0.75, 0.75))


def test_the_time_for_a_response_is_the_apps_but_at_most_the_operators(
    partition: Partition, tiny_bundle: Bundle
) -> None:
    config = AgentConfig(max_positions=POSITIONS, answer_deadline_ms=5000)
    planner = RequestPlanner(partition, ChatTokenizer(tiny_bundle), config)
    prompts = [PromptRequest(prompt="x", deadline_ms=limit) for limit in (None, 1000, 600_000)]
    assert [planner.plan(prompt).deadline_s for prompt in prompts] == [5.0, 1.0, 5.0]


def test_a_token_without_an_embedding_is_refused(
    partition: Partition, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    shutil.copytree(tiny_bundle.folder / "tokenizer", tmp_path / "tokenizer")
    inner = make_tiny_tokenizer().backend_tokenizer
    inner.add_special_tokens(["<pad>"])
    inner.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    template = tmp_path / "tokenizer" / "chat_template.jinja"
    template.write_text("<pad>{{ messages[0]['content'] }}", encoding="utf-8")
    tokenizer = ChatTokenizer(Bundle(tmp_path, tiny_bundle.manifest))
    planner = RequestPlanner(partition, tokenizer, AgentConfig(max_positions=POSITIONS))
    with pytest.raises(PromptError, match="token id 384, and this model has embeddings for 384"):
        planner.plan(SHORT)


def test_no_token_ends_a_response_that_ignores_the_end_of_sequence(
    planner: RequestPlanner, partition: Partition
) -> None:
    assert planner.plan(SHORT).eos_token_ids == partition.manifest.model.eos_token_ids != ()
    assert planner.plan(PromptRequest(prompt="x", ignore_eos=True)).eos_token_ids == ()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (LONG, f"holds {POSITIONS} positions for both; send a shorter prompt"),
        (
            PromptRequest(prompt="x", max_new_tokens=POSITIONS),
            f"and {POSITIONS} new ones are requested",
        ),
        (PromptRequest(prompt="x", thresholds=(0.5,)), "expected 2 thresholds"),
    ],
)
def test_a_request_that_does_not_fit_is_refused_with_the_limit(
    planner: RequestPlanner, prompt: PromptRequest, message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        planner.plan(prompt)


def test_the_memory_of_a_plan_is_that_of_a_cascade(partition: Partition) -> None:
    cascade = Cascade(partition, POSITIONS)
    cascade.append([5, 9, 300] * (POSITIONS // 3))
    num_bytes = cascade._token_ids.nbytes
    for run in cascade._runs:
        num_bytes += run.hidden_states.nbytes + sum(cache.nbytes for cache in run.caches)
    assert Cascade.num_bytes(partition, POSITIONS) == num_bytes
    assert num_bytes < MB


MANY = {
    "words": "word " * 50_000,
    "blanks": "a" + " \n" * 125_000,
    "tabs": "a" + "\t" * 250_000 + "b",
    "one word": "z" * 250_000,
    "marks": "\ufdd0999\ufdd0" * 50_000,
}


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("text", MANY.values(), ids=MANY)
def test_of_a_prompt_that_cannot_fit_the_tokenizer_sees_a_small_part(
    partition: Partition,
    tiny_bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    raw: bool,
) -> None:
    planner = RequestPlanner(
        partition, ChatTokenizer(tiny_bundle), AgentConfig(max_positions=POSITIONS)
    )
    encode = ControlTokens.encode
    lengths: list[int] = []

    def counting(tokens: ControlTokens, rendered: str) -> list[int]:
        lengths.append(len(rendered))
        return encode(tokens, rendered)

    monkeypatch.setattr(ControlTokens, "encode", counting)
    with pytest.raises(PromptError, match="more than 64 tokens of this model can hold"):
        planner.plan(PromptRequest(prompt=text, raw=raw))
    assert sum(lengths) < 10_000
