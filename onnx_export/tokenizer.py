"""The tokenizer and the chat template of a bundle: tried before the work, then written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import jinja2
from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from fleet.errors import ExportError

Turns = list[dict[str, str]]

DEFAULT_TEMPLATE: Final = "default"
VARIABLES: Final = ("bos_token", "eos_token")  # all that a device gives to a template
CONVERSATION: Final[Turns] = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Italy?"},
]
WITH_SYSTEM_TURN: Final[Turns] = [
    {"role": "system", "content": "Answer in one word."},
    CONVERSATION[-1],
]


def check_tokenizer(
    tokenizer: Any, name: str, vocab_size: int, progress: Callable[[str], None] = lambda _: None
) -> None:
    """Check that devices can use the tokenizer and the chat template of the model `name`.

    Report added tokens without a row in the embedding of `vocab_size` rows; they are left out.

    Raises:
        ExportError: they cannot; the message is one line.
    """
    if not tokenizer.is_fast:
        raise ExportError(
            f"the tokenizer of {name} has no fast form (tokenizer.json), which devices need"
        )
    template = chat_template(tokenizer, name)
    left_out = added_tokens_beyond(tokenizer, vocab_size)
    if left_out:
        progress(
            f"left out {len(left_out)} of the tokenizer's added tokens, such as {left_out[0]!r}: "
            f"no row in the embedding of {vocab_size} rows"
        )
    written = Tokenizer.from_str(tokenizer_json(tokenizer, vocab_size))
    check_ids(written, name, vocab_size)
    check_chat_template(tokenizer, template, written, name, progress)


def chat_template(tokenizer: Any, name: str) -> str:
    """Return the chat template. If there are several, return the one with the name ``default``.

    Raises:
        ExportError: there is no such template.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get(DEFAULT_TEMPLATE)
    if not isinstance(template, str):
        raise ExportError(
            f"the tokenizer of {name} has no chat template, or several and none of them is "
            f"{DEFAULT_TEMPLATE!r}; devices need one"
        )
    return template


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


def check_chat_template(
    tokenizer: Any,
    template: str,
    written: Tokenizer,
    name: str,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Render a conversation and one with a system turn; compare with transformers.

    A template may refuse a system turn with ``raise_exception``; this is reported.

    Raises:
        ExportError: the template fails, renders nothing, or devices get other tokens.
    """
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


def check_rendering(
    tokenizer: Any, template: str, written: Tokenizer, name: str, turns: Turns
) -> None:
    """Raise ExportError unless a device renders `turns` to the tokens of transformers."""
    written.no_padding()
    written.no_truncation()
    try:
        expected = tokenizer.apply_chat_template(
            turns, chat_template=template, add_generation_prompt=True
        )
        text = device_text(tokenizer, template, turns)
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


def device_text(tokenizer: Any, template: str, turns: Turns) -> str:
    """Render `turns` with the variables that a device has."""
    variables = {name: getattr(tokenizer, name) or "" for name in VARIABLES}
    texts, _ = render_jinja_template(
        [turns], chat_template=template, add_generation_prompt=True, **variables
    )
    text: str = texts[0]
    return text


def roles(turns: Turns) -> str:
    """Return the roles of turns, e.g. ``system, user``."""
    return ", ".join(turn["role"] for turn in turns)


def one_line(error: BaseException) -> str:
    """Return an error's text on one line, or its type if it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def write_tokenizer(tokenizer: Any, name: str, vocab_size: int, folder: Path) -> None:
    """Write ``tokenizer.json``, the chat template and its two special tokens for devices."""
    folder.mkdir()
    template = chat_template(tokenizer, name)
    files = {
        "tokenizer.json": tokenizer_json(tokenizer, vocab_size),
        "chat_template.jinja": template,
        "config.json": json.dumps({key: getattr(tokenizer, key) for key in VARIABLES}) + "\n",
    }
    for file_name, text in files.items():
        (folder / file_name).write_text(text, encoding="utf-8")
