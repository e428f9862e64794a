"""Text to token ids and back, with the model's own chat template; no transformers needed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from datetime import datetime
from typing import Any, Final

import jinja2
import msgspec
from jinja2.ext import Extension, LoopControlExtension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from msgspec import Struct
from tokenizers import Tokenizer

from edge_agent.engine.control_tokens import ControlTokens
from fleet.bundles.manifest import Bundle
from fleet.errors import BundleError, PromptError
from fleet.protocol.prompt import ChatMessage

REPLACEMENT: Final = "\ufffd"
BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-F]{2}>")


class _SpecialTokens(Struct):
    """The special tokens that a template may use; None if the model has no such token."""

    bos_token: str | None
    eos_token: str | None


class GenerationMark(Extension):
    """The tag ``{% generation %}``, which marks the assistant's text for training; its content is
    unchanged.
    """

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTokenizer:
    """The bundle's tokenizer and chat template, with the functions that transformers gives to
    templates.

    The control tokens of the template stay control tokens; their names inside a message are
    ordinary text (see :class:`ControlTokens`).
    """

    def __init__(self, bundle: Bundle) -> None:
        """Load the files.

        Raises:
            BundleError: a file is unusable.
        """
        try:
            self._tokenizer = Tokenizer.from_file(str(bundle.path("tokenizer/tokenizer.json")))
            special = msgspec.json.decode(
                _read_text(bundle, "tokenizer/config.json"), type=_SpecialTokens
            )
            source = _read_text(bundle, "tokenizer/chat_template.jinja")
            self._template = _environment().from_string(source)
        except Exception as error:  # noqa: BLE001  the tokenizers raise no narrower type
            raise BundleError(
                f"the tokenizer of {bundle.folder} does not load: {error}; export the bundle again"
            ) from None
        self._variables = {
            "bos_token": special.bos_token or "",
            "eos_token": special.eos_token or "",
        }
        self._special_ids = frozenset(
            token_id
            for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        )
        self._control_tokens = ControlTokens(self._tokenizer, source)

    def encode_chat(self, messages: Iterable[ChatMessage]) -> list[int]:
        """Return the token ids of a conversation, ready for the assistant's message.

        Raises:
            PromptError: the model's template refuses the conversation, or makes no text of it.
        """
        turns = [
            {"role": message.role, "content": self._control_tokens.shield(message)}
            for message in messages
        ]
        ids = self._control_tokens.encode(self._render(turns))
        if not ids:
            raise PromptError(
                "the model's chat template makes an empty prompt of these messages; "
                "export the bundle again with another template"
            )
        return ids

    def _render(self, turns: list[dict[str, str]]) -> str:
        try:
            return self._template.render(
                messages=turns,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._variables,
            )
        except Exception as error:  # noqa: BLE001  a template raises errors of any type
            raise PromptError(
                f"the model's chat template refuses these messages: {error}"
            ) from None

    def stream(self) -> TextStream:
        return TextStream(self._tokenizer, self._special_ids)


class TextStream:
    """A conversion of tokens to text that holds back what a later token may change.

    That is an incomplete character, and a run of byte tokens (``<0x0A>``), which the decoder of
    such tokenizers turns into text as a whole. The pieces together are the decoded text.
    """

    def __init__(self, tokenizer: Tokenizer, special_ids: frozenset[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        self._ids: list[int] = []
        self._length = 0  # characters of all pieces
        # The newest tokens, from `_start` on, are decoded again with each token that follows:
        # decoders treat the first token of a text differently. `_shown` is their known text.
        self._start = 0
        self._shown = ""

    @property
    def text(self) -> str:
        """The text of all tokens so far."""
        return self._decode(0)

    def push(self, token_id: int) -> str:
        """Return the new text after one more token; empty while it may still change."""
        if token_id in self._special_ids:
            return ""
        num_known = len(self._ids)
        self._ids.append(token_id)
        window = self._decode(self._start)
        if self._may_change(token_id, window):
            return ""
        piece = window[len(self._shown) :]
        self._length += len(piece)
        self._shown = window
        if newest := self._decode(num_known):  # else the next token would be the first again
            self._start = num_known
            self._shown = newest
        return piece

    def flush(self) -> str:
        """Return the text held back; bytes that make no character become U+FFFD."""
        piece = self.text[self._length :]
        self._length += len(piece)
        return piece

    def _may_change(self, token_id: int, window: str) -> bool:
        is_byte = BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token_id) or "")
        return bool(is_byte) or window.endswith(REPLACEMENT) or not window.startswith(self._shown)

    def _decode(self, start: int) -> str:
        text: str = self._tokenizer.decode(self._ids[start:], skip_special_tokens=True)
        return text


def _read_text(bundle: Bundle, name: str) -> str:
    return bundle.path(name).read_text(encoding="utf-8")


def _environment() -> ImmutableSandboxedEnvironment:
    """Return an environment for templates with the settings and functions of transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, GenerationMark]
    )
    environment.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
    environment.filters["tojson"] = _to_json
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without HTML escapes; Jinja's own filter would write ``<`` as ``\\u003c``."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
