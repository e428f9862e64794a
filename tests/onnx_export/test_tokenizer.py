"""Tokenizers and chat templates as checkpoints have them: mended, reported or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from edge_agent.engine.tokenizer import ChatTokenizer
from fleet.bundles.manifest import CHAT_TEMPLATE as CHAT_TEMPLATE_FILE
from fleet.bundles.manifest import TOOL_TEMPLATE, Bundle
from fleet.errors import ExportError
from fleet.protocol.prompt import ChatMessage
from onnx_export.architecture import eos_token_ids
from onnx_export.bundle import export_bundle
from onnx_export.config import ExportConfig
from onnx_export.tokenizer import (
    CONVERSATION,
    WITH_SYSTEM_TURN,
    chat_templates,
    check_tokenizer,
)
from tests.tiny import CHAT_TEMPLATE, VOCAB_SIZE, make_tiny_checkpoint, make_tiny_tokenizer

TOOLS_TEMPLATE = "{{ tools | tojson }}" + CHAT_TEMPLATE
REFUSES_SYSTEM_TURNS = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + CHAT_TEMPLATE
)


def export(folder: Path, checkpoint: Path) -> tuple[Bundle, list[str]]:
    lines: list[str] = []
    config = ExportConfig(
        out=folder / "bundle",
        exits=(2,),
        model=str(checkpoint),
        exit_head="shared",
        quantization="fp32",
    )
    export_bundle(config, lines.append)
    return Bundle.load(config.out), lines


def set_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(content), encoding="utf-8")


def check_template(template: str) -> list[str]:
    """Check the tiny tokenizer with `template` and return the reported lines."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = template
    lines: list[str] = []
    check_tokenizer(tokenizer, "tiny", VOCAB_SIZE, lines.append)
    return lines


@pytest.mark.parametrize(
    ("config_ids", "generation_ids", "expected"),
    [
        (0, None, (0, 2)),
        (0, [5, 0], (0, 2, 5)),
        ([7, 3], None, (2, 3, 7)),
        (None, None, (2,)),
        (VOCAB_SIZE, -1, (2,)),
        ([[0]], None, (2,)),
    ],
)
def test_an_answer_ends_at_the_end_tokens_of_all_three_sources(
    config_ids: Any, generation_ids: Any, expected: tuple[int, ...], tmp_path: Path
) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "model")
    set_json(checkpoint / "config.json", eos_token_id=config_ids)
    set_json(checkpoint / "generation_config.json", eos_token_id=generation_ids)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)  # its end token is 2
    assert eos_token_ids("tiny", model, tokenizer) == expected
    tokenizer.eos_token = None  # the chat template still writes it after an answer
    assert eos_token_ids("tiny", model, tokenizer) == expected


def test_odd_parts_of_a_checkpoint_are_mended_in_the_bundle(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "model", eos_token_id=0)
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(checkpoint)
    (checkpoint / "chat_template.jinja").unlink()
    templates = [
        {"name": "tool_use", "template": TOOLS_TEMPLATE},
        {"name": "rag", "template": "{{ documents[0].text }}"},
        {"name": "default", "template": CHAT_TEMPLATE},
    ]
    set_json(checkpoint / "tokenizer_config.json", chat_template=templates)
    bundle, lines = export(tmp_path, checkpoint)
    assert bundle.manifest.model.eos_token_ids == (0, 2)
    assert bundle.path(CHAT_TEMPLATE_FILE).read_text() == CHAT_TEMPLATE
    assert bundle.path(TOOL_TEMPLATE).read_text() == TOOLS_TEMPLATE
    assert (
        "left out 1 of the tokenizer's added tokens, such as '<pad>': "
        "no row in the embedding of 384 rows"
    ) in lines
    message = ChatMessage("user", "What does <pad> mean?")
    ids = ChatTokenizer(bundle).encode_chat([message])
    assert max(ids) < VOCAB_SIZE


def test_a_bundle_without_odd_tokens_has_the_tokenizer_as_it_is(tiny_bundle: Bundle) -> None:
    text = tiny_bundle.path("tokenizer/tokenizer.json").read_text(encoding="utf-8")
    assert text == make_tiny_tokenizer().backend_tokenizer.to_str(pretty=True)


def test_a_vocabulary_beyond_the_embedding_is_refused_in_one_line() -> None:
    tokenizer = make_tiny_tokenizer()
    with pytest.raises(ExportError, match="has the token 'w383' with id 383, but") as raised:
        check_tokenizer(tokenizer, "tiny", VOCAB_SIZE - 4)
    assert "\n" not in str(raised.value)


def test_a_template_that_needs_a_token_beyond_the_embedding_is_refused() -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.chat_template = "<|user|>" + CHAT_TEMPLATE
    with pytest.raises(ExportError, match="makes other tokens on a device"):
        check_tokenizer(tokenizer, "tiny", VOCAB_SIZE)


@pytest.mark.parametrize("is_list", [True, False])
def test_several_templates_are_found_in_both_forms_of_a_checkpoint(
    is_list: bool, tmp_path: Path
) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": TOOLS_TEMPLATE}
    tokenizer.save_pretrained(tmp_path, save_jinja_files=not is_list)
    has_files = (tmp_path / "additional_chat_templates" / "tool_use.jinja").is_file()
    assert has_files is not is_list
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert chat_templates(loaded, "tiny") == {
        CHAT_TEMPLATE_FILE: CHAT_TEMPLATE,
        TOOL_TEMPLATE: TOOLS_TEMPLATE,
    }
    assert chat_templates(loaded, "tiny", "raw") == {}


@pytest.mark.parametrize("template", ["{{ tools[0]['x'].y }}" + CHAT_TEMPLATE, "{{ tools }}"])
def test_a_template_of_tools_that_does_not_work_is_refused(template: str) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": template}
    with pytest.raises(ExportError, match=r"the chat template of tiny (fails|leaves out)"):
        check_tokenizer(tokenizer, "tiny", VOCAB_SIZE)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['content'] + 1 }}", "fails on the turns user, assistant, user: .*str"),
        ("{% for m in messages %}{{ m['content'] }", "fails on the turns .*unexpected '}'"),
        ("", "leaves out the last of the turns user, assistant, user"),
        ("Hello!", "leaves out the last of the turns user, assistant, user"),
        (
            "{% if messages[0]['role'] == 'user' %}{{ messages[2]['content'] }}{% endif %}",
            "leaves out the last of the turns system, user",
        ),
        ("{{ raise_exception('never') }}", "fails on the turns user, assistant, user: never"),
        (
            "{% if messages[0]['role'] == 'system' %}{{ 1 + '' }}{% endif %}" + CHAT_TEMPLATE,
            "fails on the turns system, user",
        ),
        (CHAT_TEMPLATE + "{{ pad_token }}", "makes other tokens on a device"),
    ],
)
def test_a_template_that_does_not_work_is_refused_in_one_line(template: str, message: str) -> None:
    with pytest.raises(ExportError, match=f"the chat template of tiny .*{message}") as raised:
        check_template(template)
    assert "\n" not in str(raised.value)


def test_a_template_may_refuse_system_turns_and_the_export_reports_it() -> None:
    assert check_template(CHAT_TEMPLATE) == []
    assert check_template(REFUSES_SYSTEM_TURNS) == [
        "the chat template refuses system turns (System role not supported); "
        "devices refuse prompts with one"
    ]


def test_the_template_is_tried_before_the_model_is_loaded(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "model")
    (checkpoint / "chat_template.jinja").write_text("{% for m in messages %}")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ExportError, match="the chat template of"):
        export(tmp_path, checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("turns", [CONVERSATION, WITH_SYSTEM_TURN])
def test_a_device_makes_the_tokens_that_the_export_compared(
    turns: list[dict[str, str]], tiny_bundle: Bundle
) -> None:
    messages = [ChatMessage(**turn) for turn in turns]  # type: ignore[arg-type]
    expected = make_tiny_tokenizer().apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False
    )
    assert ChatTokenizer(tiny_bundle).encode_chat(messages) == expected


def test_padding_in_the_tokenizer_file_is_no_difference() -> None:
    tokenizer = make_tiny_tokenizer()
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.enable_padding(length=4096)
    backend.enable_truncation(max_length=4)
    check_tokenizer(tokenizer, "tiny", VOCAB_SIZE)
