"""Texts that a model continues: their tokens are those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, processors
from transformers import PreTrainedTokenizerFast

from edge_agent.engine.tokenizer import ChatTokenizer
from fleet.bundles.manifest import Bundle, PromptFormat
from fleet.errors import ExportError, PromptError
from fleet.protocol.prompt import ChatMessage, PromptRequest
from onnx_export.tokenizer import check_tokenizer, write_tokenizer
from tests.edge_agent.engine.test_tokenizer import byte_fallback_tokenizer
from tests.fleet.bundles.test_manifest import manifest
from tests.tiny import CHAT_TEMPLATE, VOCAB_SIZE, make_tiny_tokenizer

TEXTS = ("The capital", "  a b\n", "a\u2603b caf\u00e9", "a</s>b <s>", "\n\n", "a <|im_end|> b")


def with_ends(backend: Tokenizer, single: str, *names: str) -> PreTrainedTokenizerFast:
    """Return a base model's tokenizer that adds the tokens `names` as in `single`."""
    pairs = [(name, backend.token_to_id(name)) for name in names]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=pairs)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def llama_2() -> PreTrainedTokenizerFast:
    return with_ends(byte_fallback_tokenizer(), "<s> $A", "<s>")


def qwen() -> PreTrainedTokenizerFast:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def device_tokenizer(
    tokenizer: Any, folder: Path, prompt_format: PromptFormat | None = None
) -> ChatTokenizer:
    write_tokenizer(tokenizer, "tiny", VOCAB_SIZE, folder, prompt_format)
    files = {f"tokenizer/{path.name}": b"" for path in (folder / "tokenizer").iterdir()}
    return ChatTokenizer(Bundle(folder, manifest(files)))


@pytest.mark.parametrize("tokenizer", [llama_2(), qwen()], ids=["llama_2", "qwen"])
def test_a_raw_prompt_has_the_tokens_of_transformers(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    device = device_tokenizer(tokenizer, tmp_path)
    for text in TEXTS:
        ids = device.encode(PromptRequest(prompt=text, raw=True))
        assert ids == tokenizer(text)["input_ids"], text
        plain = device.encode(PromptRequest(prompt=text))
        has_control_tokens = "</s>" in text or "<|im_end|>" in text
        assert plain == ids or has_control_tokens, text


def test_names_of_control_tokens_in_a_text_count_in_raw_prompts_only(tmp_path: Path) -> None:
    tokenizer = llama_2()
    device = device_tokenizer(tokenizer, tmp_path)
    end = tokenizer.convert_tokens_to_ids("</s>")
    text = "a</s>\ufdd00\ufdd0b"
    assert end in device.encode(PromptRequest(prompt=text, raw=True))
    plain = device.encode(PromptRequest(prompt=text))
    assert end not in plain
    start = tokenizer.convert_tokens_to_ids("<s>")
    assert plain.count(start) == 1 == plain.index(start) + 1


def test_the_start_of_a_raw_text_is_not_doubled(tmp_path: Path) -> None:
    tokenizer = llama_2()
    device = device_tokenizer(tokenizer, tmp_path)
    ids = tokenizer("<s>a", add_special_tokens=False)["input_ids"]
    assert device.encode(PromptRequest(prompt="<s>a", raw=True)) == ids
    assert len(device.encode(PromptRequest(prompt="<s>a"))) > len(ids)


def test_a_model_with_a_template_continues_a_text_on_request(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    device = device_tokenizer(tokenizer, tmp_path)
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ids = device.encode(PromptRequest(prompt=text, raw=True))
    assert ids == device.encode_chat([ChatMessage("user", "hi")])
    assert device.encode(PromptRequest(prompt="hi")) == ids
    assert device.encode(PromptRequest(prompt="hi", raw=True)) == tokenizer("hi")["input_ids"]


def test_a_chat_model_may_be_exported_without_its_template(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    lines: list[str] = []
    check_tokenizer(tokenizer, "tiny", VOCAB_SIZE, lines.append, "raw")
    assert lines == ["left out the chat template: devices continue the text of a prompt as it is"]
    device = device_tokenizer(tokenizer, tmp_path, "raw")
    assert device.encode(PromptRequest(prompt="hi")) == tokenizer("hi")["input_ids"]


def test_the_export_of_a_tokenizer_without_a_template_reports_it() -> None:
    lines: list[str] = []
    check_tokenizer(llama_2(), "tiny", VOCAB_SIZE, lines.append)
    assert lines == ["no chat template: devices continue the text of a prompt as it is"]


def test_an_end_that_the_tokenizer_adds_is_reported_and_left_out(tmp_path: Path) -> None:
    tokenizer = with_ends(byte_fallback_tokenizer(), "<s> $A </s>", "<s>", "</s>")
    lines: list[str] = []
    check_tokenizer(tokenizer, "tiny", VOCAB_SIZE, lines.append)
    assert lines[1:] == [
        "the tokenizer adds '</s>' at the end of a text; "
        "devices leave it out, because they continue the text"
    ]
    device = device_tokenizer(tokenizer, tmp_path)
    assert device.encode(PromptRequest(prompt="a")) == tokenizer("a")["input_ids"][:-1]


def test_a_start_without_a_row_in_the_embedding_is_refused() -> None:
    backend = byte_fallback_tokenizer()
    backend.add_special_tokens([AddedToken("<bos>", normalized=False)])
    tokenizer = with_ends(backend, "<bos> $A", "<bos>")
    with pytest.raises(ExportError, match="makes other tokens of a text on a device"):
        check_tokenizer(tokenizer, "tiny", VOCAB_SIZE)


@pytest.mark.parametrize(
    "request_",
    [
        PromptRequest(messages=(ChatMessage("user", "hi"),)),
        PromptRequest(prompt="hi", tools=({"name": "f"},)),
        PromptRequest(prompt="hi", documents=()),
    ],
)
def test_a_model_without_a_template_names_what_to_send(
    request_: PromptRequest, tmp_path: Path
) -> None:
    device = device_tokenizer(llama_2(), tmp_path)
    with pytest.raises(PromptError, match=r"no chat template .* expected 'prompt'") as raised:
        device.encode(request_)
    assert "\n" not in str(raised.value)


def test_a_text_of_which_no_token_is_left_is_refused(tmp_path: Path) -> None:
    backend = make_tiny_tokenizer().backend_tokenizer
    backend.normalizer = normalizers.Replace("\u2603", "")
    device = device_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), tmp_path)
    with pytest.raises(PromptError, match="makes no tokens of this text"):
        device.encode(PromptRequest(prompt="\u2603"))


def test_the_text_of_a_continuation_begins_with_its_space(tmp_path: Path) -> None:
    tokenizer = llama_2()
    device = device_tokenizer(tokenizer, tmp_path)
    prompt = "b"
    request = PromptRequest(prompt=prompt)
    prompt_ids = device.encode(request)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("\u2581a", "b", "<0xC3>", "<0xA9>")]
    stream = device.stream(request)
    text = "".join(stream.push(token_id) for token_id in ids) + stream.flush()
    assert text == stream.text == " ab\u00e9"
    whole = tokenizer.decode([*prompt_ids, *ids], skip_special_tokens=True)
    assert whole == prompt + text


def test_padding_and_truncation_of_a_tokenizer_do_not_count(tmp_path: Path) -> None:
    tokenizer = llama_2()
    expected = tokenizer("a" * 20)["input_ids"]
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.backend_tokenizer.enable_truncation(max_length=4)
    device = device_tokenizer(tokenizer, tmp_path)
    assert device.encode(PromptRequest(prompt="a" * 20)) == expected


def test_a_bundle_of_conversations_needs_a_template() -> None:
    with pytest.raises(ExportError, match=r"no chat template.*--prompt-format raw"):
        check_tokenizer(llama_2(), "tiny", VOCAB_SIZE, prompt_format="chat")
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = {"tool_use": CHAT_TEMPLATE}
    with pytest.raises(ExportError, match="several and none of them is 'default'"):
        check_tokenizer(tokenizer, "tiny", VOCAB_SIZE)
