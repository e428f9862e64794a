"""Text to token ids and back, with the model's own chat template; no transformers needed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime

import jinja2
from jinja2.ext import Extension, LoopControlExtension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from fleet.bundles.manifest import Bundle
from fleet.errors import BundleError, PromptError
from fleet.protocol.prompt import ChatMessage

REPLACEMENT = "\ufffd"


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
    """

    def __init__(self, bundle: Bundle) -> None:
        """Load the files.

        Raises:
            BundleError: a file is unusable.
        """
        try:
            self._tokenizer = Tokenizer.from_file(str(bundle.path("tokenizer/tokenizer.json")))
            special = json.loads(bundle.path("tokenizer/config.json").read_text())
            source = bundle.path("tokenizer/chat_template.jinja").read_text()
            environment = ImmutableSandboxedEnvironment(
                trim_blocks=True,
                lstrip_blocks=True,
                extensions=[LoopControlExtension, GenerationMark],
            )
            environment.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
            self._template = environment.from_string(source)
        except (ValueError, jinja2.TemplateError, OSError) as error:
            raise BundleError(
                f"the tokenizer of {bundle.folder} does not load: {error}; export the bundle again"
            ) from None
        self._special = {name: special[name] or "" for name in ("bos_token", "eos_token")}

    def encode_chat(self, messages: Iterable[ChatMessage]) -> list[int]:
        """Return the token ids of a conversation, ready for the assistant's message.

        Raises:
            PromptError: the model's template refuses the conversation.
        """
        roles = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._template.render(
                messages=roles, add_generation_prompt=True, **self._special
            )
        except jinja2.TemplateError as error:
            raise PromptError(
                f"the model's chat template refuses these messages: {error}"
            ) from None
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def stream(self) -> TextStream:
        return TextStream(self._tokenizer)


class TextStream:
    """A conversion of tokens to text that holds back an incomplete character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._emitted = 0

    def push(self, token_id: int) -> str:
        """Return the new text after one more token; empty while a character is incomplete."""
        self._ids.append(token_id)
        text: str = self._stream.step(self._tokenizer, token_id) or ""
        self._emitted += len(text)
        return text

    def flush(self) -> str:
        """Return the text held back, without a character that was never completed."""
        rest: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)[self._emitted :]
        return rest.rstrip(REPLACEMENT)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
