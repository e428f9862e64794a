"""The tokenizer and the chat templates of a bundle: tried before the work, then written."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import jinja2
from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from fleet.bundles.manifest import CHAT_TEMPLATE, TOOL_TEMPLATE, PromptFormat
from fleet.errors import ExportError

Turns = list[dict[str, str]]
Tools = list[dict[str, Any]]
Progress = Callable[[str], None]

TEMPLATES: Final = {"default": CHAT_TEMPLATE, "tool_use": TOOL_TEMPLATE}
"""Files of a bundle by the names of the templates that transformers chooses by itself."""
TEXT: Final = "It is 5 o'clock \u2014 caf\u00e9s close.\n\nThe"
VARIABLES: Final = ("bos_token", "eos_token")  # all that a device gives to a template
CONVERSATION: Final[Turns] = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Italy?"},
]
TOOL: Final[dict[str, Any]] = {
    "type": "function",
    "function": {
        "name": "get_population",
        "description": "Return the number of people in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
WITH_SYSTEM_TURN: Final[Turns] = [
    {"role": "system", "content": "Answer in one word."},
    CONVERSATION[-1],
]


def check_tokenizer(
    tokenizer: Any,
    name: str,
    vocab_size: int,
    progress: Progress = lambda _: None,
    prompt_format: PromptFormat | None = None,
) -> None:
    """Check that devices can use the tokenizer and the chat templates of the model `name`.

    Report added tokens without a row in the embedding of `vocab_size` rows; they are left out.
    Report a bundle without a chat template, whose devices continue texts.

    Raises:
        ExportError: they cannot; the message is one line.
    """
    if not tokenizer.is_fast:
        raise ExportError(
            f"the tokenizer of {name} has no fast form (tokenizer.json), which devices need"
        )
    templates = chat_templates(tokenizer, name, prompt_format)
    left_out = added_tokens_beyond(tokenizer, vocab_size)
    if left_out:
        progress(
            f"left out {len(left_out)} of the tokenizer's added tokens, such as {left_out[0]!r}: "
            f"no row in the embedding of {vocab_size} rows"
        )
    written = Tokenizer.from_str(tokenizer_json(tokenizer, vocab_size))
    check_ids(written, name, vocab_size)
    if templates:
        check_chat_templates(tokenizer, templates, written, name, progress)
    else:
        check_text(tokenizer, written, name, vocab_size, progress)


def chat_templates(
    tokenizer: Any, name: str, prompt_format: PromptFormat | None = None
) -> dict[str, str]:
    """Return the templates of conversations and of tools by their files; none if it is raw.

    `prompt_format` None is ``chat`` for a tokenizer with a template, otherwise ``raw``.

    Raises:
        ExportError: there are templates without a ``default`` one, or ``chat`` without any.
    """
    template = tokenizer.chat_template
    if prompt_format == "raw" or (prompt_format is None and template in (None, {})):
        return {}
    templates = template if isinstance(template, dict) else {"default": template}
    if not isinstance(templates.get("default"), str):
        raise ExportError(
            f"the tokenizer of {name} has no chat template, or several and none of them is "
            "'default'; add one, or export with --prompt-format raw, which needs none"
        )
    return {TEMPLATES[key]: templates[key] for key in TEMPLATES if key in templates}


def added_tokens_beyond(tokenizer: Any, vocab_size: int) -> list[str]:
    """Return the added tokens whose ids have no row in an embedding of `vocab_size` rows."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return [token.content for token_id, token in sorted(added.items()) if token_id >= vocab_size]


def tokenizer_json(tokenizer: Any, vocab_size: int) -> str:
    """Return ``tokenizer.json`` without the added tokens of :func:`added_tokens_beyond`."""
    text: str = tokenizer.backend_tokenizer.to_str(pretty=True)
    if not added_tokens_beyond(tokenizer, vocab_size):
        return text
    content = json.loads(text)
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["id"] < vocab_size
    ]
    return json.dumps(content, ensure_ascii=False, indent=2)


def check_ids(written: Tokenizer, name: str, vocab_size: int) -> None:
    """Raise ExportError when an id has no row in the embedding of `vocab_size` rows."""
    token, token_id = max(written.get_vocab().items(), key=lambda item: item[1])
    if token_id >= vocab_size:
        raise ExportError(
            f"the tokenizer of {name} has the token {token!r} with id {token_id}, but the "
            f"embedding has {vocab_size} rows; expected a row for each id, "
            "give the checkpoint its own tokenizer"
        )


def check_text(
    tokenizer: Any, written: Tokenizer, name: str, vocab_size: int, progress: Progress
) -> None:
    """Check that a device makes the tokens of transformers from a text.

    Tokens that the tokenizer adds at the end are reported. A device leaves them out, because it
    continues the text.

    Raises:
        ExportError: it makes other tokens, or tokens without a row in the embedding.
    """
    known = "left out the" if tokenizer.chat_template else "no"
    progress(f"{known} chat template: devices continue the text of a prompt as it is")
    written.no_padding()
    written.no_truncation()
    encoding = written.encode(TEXT)
    expected = tokenizer(TEXT, padding=False, truncation=False)["input_ids"]
    if encoding.ids != expected or max(encoding.ids) >= vocab_size:
        raise ExportError(
            f"the tokenizer of {name} makes other tokens of a text on a device than in "
            "transformers; expected only tokens that have a row in the embedding"
        )
    if encoding.special_tokens_mask[-1]:
        progress(
            f"the tokenizer adds {encoding.tokens[-1]!r} at the end of a text; "
            "devices leave it out, because they continue the text"
        )


def check_chat_templates(
    tokenizer: Any,
    templates: dict[str, str],
    written: Tokenizer,
    name: str,
    progress: Progress = lambda _: None,
) -> None:
    """Render a conversation and one with a system turn; compare with transformers.

    A template may refuse a system turn with ``raise_exception``; this is reported. The template of
    tools renders the conversation with a tool.

    Raises:
        ExportError: a template fails, renders nothing, or devices get other tokens.
    """
    template = templates[CHAT_TEMPLATE]
    check_rendering(tokenizer, template, written, name, CONVERSATION)
    try:
        check_rendering(tokenizer, template, written, name, WITH_SYSTEM_TURN)
    except ExportError as error:
        if type(error.__cause__) is not jinja2.TemplateError:  # the type of `raise_exception`
            raise
        progress(
            f"the chat template refuses system turns ({one_line(error.__cause__)}); "
            "devices refuse prompts with one"
        )
    if TOOL_TEMPLATE in templates:
        check_rendering(
            tokenizer, templates[TOOL_TEMPLATE], written, name, CONVERSATION, tools=[TOOL]
        )


def check_rendering(
    tokenizer: Any,
    template: str,
    written: Tokenizer,
    name: str,
    turns: Turns,
    tools: Tools | None = None,
) -> None:
    """Raise ExportError unless a device renders `turns` to the tokens of transformers."""
    written.no_padding()
    written.no_truncation()
    try:
        expected = tokenizer.apply_chat_template(
            turns,
            tools=tools,
            chat_template=template,
            add_generation_prompt=True,
            return_dict=False,
        )
        text = device_text(tokenizer, template, turns, tools)
    except Exception as error:  # a template raises errors of any type
        raise ExportError(
            f"the chat template of {name} fails on the turns {roles(turns)}: {one_line(error)}; "
            "expected a template for transformers, correct chat_template in the checkpoint"
        ) from error
    if turns[-1]["content"] not in text:
        raise ExportError(
            f"the chat template of {name} leaves out the last of the turns {roles(turns)}; "
            "expected the text of a prompt, correct chat_template in the checkpoint"
        )
    if written.encode(text, add_special_tokens=False).ids != expected:
        raise ExportError(
            f"the chat template of {name} makes other tokens on a device than in transformers; "
            f"expected one that uses {' and '.join(VARIABLES)} alone, "
            "and tokens that have a row in the embedding"
        )


def device_text(tokenizer: Any, template: str, turns: Turns, tools: Tools | None) -> str:
    """Render `turns` with the variables that a device has."""
    variables = {name: token for name in VARIABLES if (token := getattr(tokenizer, name))}
    texts, _ = render_jinja_template(
        [turns], tools=tools, chat_template=template, add_generation_prompt=True, **variables
    )
    text: str = texts[0]
    return text


def start_ids(tokenizer: Any) -> list[int]:
    """Return the tokens that a tokenizer adds before each text."""
    encoding = tokenizer.backend_tokenizer.encode(TEXT)
    return list(itertools.takewhile(lambda each: each in tokenizer.all_special_ids, encoding.ids))


def turn_end_id(tokenizer: Any) -> int | None:
    """Return the special token that a chat template writes after the assistant's text, if any."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    answer = CONVERSATION[1]["content"]
    try:
        text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    except Exception:  # noqa: BLE001  a template raises errors of any type
        return None
    after = tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"][:1]
    added = tokenizer.added_tokens_decoder
    return next((each for each in after if each in added and added[each].special), None)


def roles(turns: Turns) -> str:
    """Return the roles of turns, e.g. ``system, user``."""
    return ", ".join(turn["role"] for turn in turns)


def one_line(error: BaseException) -> str:
    """Return an error's text on one line, or its type if it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def write_tokenizer(
    tokenizer: Any,
    name: str,
    vocab_size: int,
    folder: Path,
    prompt_format: PromptFormat | None = None,
) -> None:
    """Write the folder ``tokenizer`` of the bundle in `folder`.

    It has ``tokenizer.json``, the chat templates, if any, and their two special tokens.
    """
    files = {
        "tokenizer/tokenizer.json": tokenizer_json(tokenizer, vocab_size),
        "tokenizer/config.json": json.dumps({key: getattr(tokenizer, key) for key in VARIABLES})
        + "\n",
    }
    files |= chat_templates(tokenizer, name, prompt_format)
    (folder / "tokenizer").mkdir()
    for file_name, text in files.items():
        (folder / file_name).write_text(text, encoding="utf-8")
