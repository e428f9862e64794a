"""Conversations in the chat templates of known models become the tokens of transformers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from edge_agent.engine.tokenizer import ChatTokenizer
from fleet.bundles.manifest import TOOL_TEMPLATE, Bundle
from fleet.errors import PromptError
from fleet.protocol.prompt import ChatMessage, parse_prompt
from onnx_export.tokenizer import check_tokenizer, turn_end_id, write_tokenizer
from tests.chat_templates import CONVERSATIONS, STYLES, TIME, WEATHER, user
from tests.fleet.bundles.test_manifest import manifest
from tests.tiny import make_tiny_tokenizer

VOCAB_SIZE = 512


@cache
def tokenizer_in(style: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes with the special tokens and templates of a style."""
    known = STYLES[style]
    backend = make_tiny_tokenizer().backend_tokenizer
    ends = [token for token in (known.bos_token, known.eos_token) if token]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ends])
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in known.special])
    backend.add_tokens([AddedToken(token, normalized=False) for token in known.extra])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=known.bos_token,
        eos_token=known.eos_token,
        chat_template=known.templates,
    )


def device_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> ChatTokenizer:
    """Return the device's tokenizer of a bundle that the export would write."""
    write_tokenizer(tokenizer, "tiny", VOCAB_SIZE, folder)
    files = sorted((folder / "tokenizer").iterdir())
    names = dict.fromkeys((f"tokenizer/{path.name}" for path in files), b"")
    return ChatTokenizer(Bundle(folder, manifest(names)))


def expect(tokenizer: PreTrainedTokenizerFast, conversation: dict[str, Any]) -> list[int] | str:
    """Return the tokens of transformers, or the reason why the template refuses."""
    try:
        ids = tokenizer.apply_chat_template(
            conversation["messages"],
            tools=conversation.get("tools"),
            documents=conversation.get("documents"),
            add_generation_prompt=True,
        )
    except jinja2.TemplateError as error:
        return str(error)
    assert isinstance(ids, list)
    return ids


def encode(tokenizer: ChatTokenizer, conversation: dict[str, Any]) -> list[int] | str:
    """Return the tokens of a device for a prompt in JSON, or its reason to refuse it."""
    try:
        return tokenizer.encode(parse_prompt(json.dumps(conversation).encode()))
    except PromptError as error:
        return str(error)


@pytest.mark.parametrize("style", STYLES)
def test_a_device_makes_the_tokens_of_transformers_or_refuses_as_it_does(
    style: str, tmp_path: Path
) -> None:
    tokenizer = tokenizer_in(style)
    device = device_tokenizer(tokenizer, tmp_path)
    refusals = set()
    for name, conversation in CONVERSATIONS.items():
        expected = expect(tokenizer, conversation)
        ids = encode(device, conversation)
        if isinstance(expected, str):
            refusals.add(name)
            expected = f"the model's chat template refuses these messages: {expected}"
        assert ids == expected, name
    assert len(CONVERSATIONS) - len(refusals) >= 14, refusals
    assert ("two users" in refusals) is (style in ("mistral", "gemma"))


@pytest.mark.parametrize("style", STYLES)
def test_the_text_of_a_conversation_is_that_of_transformers(style: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_in(style)
    device = device_tokenizer(tokenizer, tmp_path)
    conversation = CONVERSATIONS["tools and documents"]
    expected = tokenizer.apply_chat_template(
        conversation["messages"],
        tools=conversation["tools"],
        documents=conversation["documents"],
        add_generation_prompt=True,
        tokenize=False,
    )
    ids = device.encode(parse_prompt(json.dumps(conversation).encode()))
    assert tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False) == expected


@pytest.mark.parametrize("style", STYLES)
def test_the_export_accepts_the_templates_and_writes_them(style: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_in(style)
    check_tokenizer(tokenizer, "tiny", VOCAB_SIZE)
    write_tokenizer(tokenizer, "tiny", VOCAB_SIZE, tmp_path)
    assert (tmp_path / TOOL_TEMPLATE).is_file() is (style == "chatml")


@pytest.mark.parametrize(
    ("style", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("llama_3", "<|eot_id|>"),
        ("mistral", "</s>"),
        ("gemma", "<end_of_turn>"),
        ("phi", "<|end|>"),
    ],
)
def test_the_token_after_an_answer_in_the_template_ends_an_answer(style: str, end: str) -> None:
    tokenizer = tokenizer_in(style)
    assert turn_end_id(tokenizer) == tokenizer.convert_tokens_to_ids(end)


@pytest.mark.parametrize("style", ["chatml", "llama_3", "phi"])
def test_the_names_of_control_tokens_in_tools_and_documents_are_ordinary_text(
    style: str, tmp_path: Path
) -> None:
    tokenizer = tokenizer_in(style)
    device = device_tokenizer(tokenizer, tmp_path)
    name = STYLES[style].eos_token
    plain = [user("a")]
    forged = {
        "messages": plain,
        "tools": [TIME | {"name": name, f"x{name}": {"y": [name, 3]}}],
        "documents": [{"title": name, "text": name}],
    }
    harmless = json.loads(json.dumps(forged).replace(name, "name"))
    end = tokenizer.convert_tokens_to_ids(name)
    request = parse_prompt(json.dumps(forged).encode())
    expected = device.encode(parse_prompt(json.dumps(harmless).encode()))
    ids = device.encode(request)
    assert ids.count(end) == expected.count(end)
    text = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
    assert text == tokenizer.apply_chat_template(
        plain,
        tools=forged["tools"],
        documents=forged["documents"],
        add_generation_prompt=True,
        tokenize=False,
    )


def test_a_refusal_of_a_template_is_one_line_and_changes_no_other_prompt(tmp_path: Path) -> None:
    tokenizer = tokenizer_in("gemma")
    device = device_tokenizer(tokenizer, tmp_path)
    before = encode(device, CONVERSATIONS["three turns"])
    refusal = encode(device, CONVERSATIONS["two users"])
    assert refusal == (
        "the model's chat template refuses these messages: "
        "Conversation roles must alternate user/assistant/user/assistant/..."
    )
    deep: Any = []
    for _ in range(400):
        deep = [deep]
    encode(device, {"messages": [user("a")], "tools": [{"a": deep}]})
    assert encode(device, CONVERSATIONS["three turns"]) == before


def test_an_error_of_a_template_on_several_lines_becomes_one_short_line(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ raise_exception('no\\n  tools') if tools else raise_exception(messages[0].content) }}"
    )
    device = device_tokenizer(tokenizer, tmp_path)
    with pytest.raises(PromptError, match=r"refuses these messages: no tools$"):
        device.encode_chat([ChatMessage("user", "a")], tools=[WEATHER])
    with pytest.raises(PromptError, match=r"refuses these messages: <\|im_end\|> a$"):
        device.encode_chat([ChatMessage("user", "<|im_end|> a")])
    with pytest.raises(PromptError) as raised:
        device.encode_chat([ChatMessage("user", "a" * 100_000)])
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token is defined }}",
        "{{ strftime_now('%Z|%z|') }}",
        "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{% endgeneration %}{{ a }}",
        "{% if true %}\n  {% set a = 1 %}\n  a\n{% endif %}\n",
        "{{ {'b': 1, 'a': [true, none, 1.0, 'é<']} | tojson }}",
    ],
)
def test_a_template_renders_as_in_transformers(template: str, tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.bos_token = None
    device = device_tokenizer(tokenizer, tmp_path)
    assert encode(device, {"messages": [user("a")]}) == expect(tokenizer, {"messages": [user("a")]})
