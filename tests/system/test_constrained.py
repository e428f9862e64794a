"""Answers of a given form: valid in every mode, and in verified mode those of the whole model."""

from __future__ import annotations

import json
import re
import shutil
from typing import Any

import pytest

from benchmarks.whole_model import WholeModel
from fleet.bundles.manifest import Bundle
from fleet.errors import PromptError, RefusedPromptError
from fleet.protocol.constraint import JsonSchemaFormat, ResponseFormat
from fleet.protocol.modes import CLOUD, Mode
from fleet.protocol.prompt import PromptRequest
from tests.system.memory_fleet import memory_fleet

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "room": {"enum": ["kitchen", "hall"]},
        "degrees": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
    },
    "required": ["room", "degrees", "tags"],
    "additionalProperties": False,
}


def schema_format(schema: dict[str, Any]) -> ResponseFormat:
    return ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(schema=schema))


PROMPTS = ("How warm is it?", "Say something about rivers.")
NUM_TOKENS = 96


def check_object(text: str) -> None:
    value = json.loads(text)
    assert list(value) == ["room", "degrees", "tags"]
    assert value["room"] in ("kitchen", "hall")
    assert value["degrees"] in range(100)
    assert all(len(tag) <= 4 for tag in value["tags"])


def constrained(prompt: str, mode: Mode, **changes: Any) -> PromptRequest:
    fields: dict[str, Any] = {
        "response_format": schema_format(SCHEMA),
        "max_new_tokens": NUM_TOKENS,
        "threshold": 0.05,
    } | changes
    return PromptRequest(prompt=prompt, mode=mode, **fields)


@pytest.mark.parametrize("mode", Mode)
def test_an_answer_matches_its_schema_in_every_mode(tiny_bundle: Bundle, mode: Mode) -> None:
    with memory_fleet() as fleet:
        fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle)
        for prompt, temperature in zip(PROMPTS, (0.0, 1.0), strict=True):
            answer = fleet.ask(constrained(prompt, mode, temperature=temperature, seed=3))
            assert answer.last.finish_reason == "stop"
            check_object(answer.text)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_verified_answer_is_the_whole_models_under_the_same_mask(
    tiny_bundle: Bundle, temperature: float
) -> None:
    whole = WholeModel(tiny_bundle, num_threads=1)
    with memory_fleet() as fleet:
        fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle)
        for prompt in PROMPTS:
            asked = constrained(prompt, Mode.VERIFIED, temperature=temperature, seed=5)
            answer = fleet.ask(asked)
            expected = whole.generate(prompt, NUM_TOKENS, asked.sampling, asked.choice_rules(0))
            assert answer.token_ids == expected
            assert answer.last.usage is not None
            assert answer.last.usage.drafted > len(answer.token_ids) / 2


@pytest.fixture(scope="module")
def without_tokenizer(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle of a worker that has only the cloud's half."""
    folder = tmp_path_factory.mktemp("worker")
    shutil.copytree(tiny_bundle.folder / "cloud", folder / "cloud")
    return Bundle(folder, tiny_bundle.manifest)


def test_a_device_whose_worker_cannot_apply_the_form_answers_alone_in_that_form(
    tiny_bundle: Bundle, without_tokenizer: Bundle
) -> None:
    with memory_fleet() as fleet:
        fleet.start_worker(without_tokenizer)
        fleet.start_device(tiny_bundle)
        answer = fleet.ask(constrained(PROMPTS[0], Mode.COLLABORATIVE, threshold=1.0))
        check_object(answer.text)
        assert CLOUD not in answer.sources
        assert answer.last.note is not None
        assert "bad_constraint" in answer.last.note
        with pytest.raises(PromptError, match=r"no worker accepts .*bad_constraint"):
            fleet.ask(constrained(PROMPTS[0], Mode.VERIFIED))


def test_without_any_worker_the_answer_has_the_form(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        fleet.start_device(tiny_bundle)
        answer = fleet.ask(constrained(PROMPTS[0], Mode.COLLABORATIVE))
    check_object(answer.text)


def test_an_answer_that_reaches_its_length_is_cut(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        fleet.start_device(tiny_bundle)
        answer = fleet.ask(constrained(PROMPTS[0], Mode.STANDALONE, max_new_tokens=8))
    assert answer.last.finish_reason == "length"
    assert len(answer.token_ids) == 8


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"response_format": None, "regex": "("}, "regex: .*unclosed group"),
        ({"response_format": schema_format({"type": "strin"})}, r"schema: .*strin"),
        ({"response_format": schema_format({"not": {}})}, r"schema: .*not"),
    ],
)
def test_a_form_that_is_none_is_refused_in_one_reply(
    tiny_bundle: Bundle, fields: dict[str, Any], reason: str
) -> None:
    with memory_fleet() as fleet:
        fleet.start_device(tiny_bundle)
        with pytest.raises(RefusedPromptError, match=reason) as caught:
            fleet.ask(constrained(PROMPTS[0], Mode.STANDALONE, **fields))
    assert caught.value.code == "bad_prompt"


@pytest.mark.parametrize("mode", [Mode.STANDALONE, Mode.VERIFIED])
def test_an_answer_matches_a_regular_expression(tiny_bundle: Bundle, mode: Mode) -> None:
    pattern = r"(yes|no), \d{2}% sure"
    with memory_fleet() as fleet:
        fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle)
        answer = fleet.ask(constrained(PROMPTS[0], mode, response_format=None, regex=pattern))
    assert re.fullmatch(pattern, answer.text)
