"""Fields that a request leaves out, from the device's settings."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

import pytest
from msgspec.structs import asdict, replace

from edge_agent.config import AgentConfig
from edge_agent.engine.tokenizer import ChatTokenizer
from edge_agent.serving.request_defaults import with_defaults
from edge_agent.serving.request_planner import RequestPlanner
from fleet.bundles.manifest import Bundle
from fleet.errors import ConfigError
from fleet.graphs.partition import Partition
from fleet.protocol.messages import NO_RULES
from fleet.protocol.prompt import ChatMessage, PromptRequest, SamplingOptions

SAMPLING: Final = SamplingOptions(
    temperature=0.7,
    top_p=0.9,
    top_k=40,
    min_p=0.1,
    repetition_penalty=1.2,
    presence_penalty=0.5,
    frequency_penalty=-0.5,
)
NEUTRAL: Final = SamplingOptions(
    temperature=0.0,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
)
REFUSING: Final = (
    "{% if 'system' == messages[0].role %}{{ raise_exception('no system role') }}{% endif %}"
)
CONFIG: Final = AgentConfig(system_prompt="Be short.", **asdict(SAMPLING))
SYSTEM: Final = ChatMessage("system", "Be short.")
HI: Final = ChatMessage("user", "hi")


def test_what_a_request_leaves_out_is_the_devices() -> None:
    completed = with_defaults(PromptRequest(prompt="hi"), CONFIG)
    assert completed.sampling_options == SAMPLING
    assert completed.chat == (SYSTEM, HI)


def test_what_a_request_has_stays() -> None:
    completed = with_defaults(PromptRequest(prompt="hi", seed=4, **asdict(NEUTRAL)), CONFIG)
    assert completed.sampling_options == NEUTRAL
    assert completed.seed == 4
    assert completed.choice_rules(3) == NO_RULES


def test_without_settings_a_request_is_greedy_and_begins_as_it_is() -> None:
    completed = with_defaults(PromptRequest(prompt="hi"), AgentConfig())
    assert completed.sampling_options == NEUTRAL
    assert (completed.prompt, completed.messages) == ("hi", None)


def test_a_random_seed_is_another_one_each_time() -> None:
    seeds = {with_defaults(PromptRequest(prompt="hi"), CONFIG).seed for _ in range(8)}
    assert len(seeds) == 8


@pytest.mark.parametrize(
    "request_",
    [
        PromptRequest(messages=(ChatMessage("system", "Rhyme."), HI)),
        PromptRequest(messages=(ChatMessage("system", ""), HI)),
        PromptRequest(messages=(HI, ChatMessage("system", "Rhyme."))),
        PromptRequest(prompt="hi", raw=True),
    ],
)
def test_a_system_message_of_the_request_and_a_raw_prompt_stay(request_: PromptRequest) -> None:
    completed = with_defaults(request_, CONFIG)
    assert (completed.prompt, completed.messages) == (request_.prompt, request_.messages)


def test_messages_begin_with_the_system_prompt() -> None:
    turns = (HI, ChatMessage("assistant", "Hello."), HI)
    assert with_defaults(PromptRequest(messages=turns), CONFIG).chat == (SYSTEM, *turns)


@pytest.fixture(scope="module")
def partition(tiny_bundle: Bundle) -> Partition:
    return Partition(tiny_bundle, num_threads=1)


def test_a_system_prompt_that_leaves_no_room_is_refused(
    partition: Partition, tiny_bundle: Bundle
) -> None:
    config = AgentConfig(max_positions=64)
    planner = RequestPlanner(partition, ChatTokenizer(tiny_bundle), config)
    planner.follow(replace(config, system_prompt="Be short."))
    with pytest.raises(ConfigError, match=r"leaves room in 64 positions, got .*; shorten it"):
        planner.follow(replace(config, system_prompt="x" * 64))


def test_a_system_prompt_that_the_template_refuses_is_refused(
    partition: Partition, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    shutil.copytree(tiny_bundle.folder / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer/chat_template.jinja").write_text(REFUSING, encoding="utf-8")
    tokenizer = ChatTokenizer(Bundle(tmp_path, tiny_bundle.manifest))
    planner = RequestPlanner(partition, tokenizer, AgentConfig())
    with pytest.raises(ConfigError, match=r"system_prompt: .*: no system role; unset it"):
        planner.follow(AgentConfig(system_prompt="Be short."))
