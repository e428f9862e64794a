"""Text to token ids and back, with the model's chat templates; no transformers needed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from itertools import takewhile
from typing import Any, Final

import jinja2
import msgspec
from jinja2.ext import Extension, LoopControlExtension
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from msgspec import Struct
from tokenizers import Tokenizer

from edge_agent.engine.control_tokens import BREAK, HOLDER, ControlTokens
from fleet.bundles.manifest import CHAT_TEMPLATE, TOOL_TEMPLATE, Bundle
from fleet.constraints.grammars import bundle_grammars
from fleet.errors import BundleError, PromptError
from fleet.protocol.prompt import ChatMessage, JsonObject, PromptRequest

REPLACEMENT: Final = "\ufffd"
NOT_ASCII: Final = re.compile(f"[^\\x00-\\x7f{BREAK}{HOLDER}]+")
MAX_REASON: Final = 500  # characters of a template's error, which may repeat a message
LETTER: Final = "a"  # a text that no tokenizer changes
CHARACTERS_PER_TOKEN: Final = 4  # of a usual text, or fewer
GROWTH: Final = 4
CUT_TOKENS: Final = 64  # more than a cut inside a word may add
BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-F]{2}>")


class _SpecialTokens(Struct):
    """The special tokens that a template may use; None if the model has no such token."""

    bos_token: str | None
    eos_token: str | None


class GenerationMark(Extension):
    """The tag ``{% generation %}``, which marks the assistant's text for training; its content is
    unchanged. A variable that is set inside ends there, as in transformers.
    """

    tags = {"generation"}

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Macro) -> str:
        return caller()


class ChatTokenizer:
    """The bundle's tokenizer and chat templates, with the functions that transformers gives to
    templates. A bundle without a template continues texts.

    The control tokens of a template stay control tokens; their names inside a message, a tool or a
    document are ordinary text (see :class:`ControlTokens`).
    """

    def __init__(self, bundle: Bundle) -> None:
        """Load the files.

        Raises:
            BundleError: a file is unusable.
        """
        try:
            self._tokenizer = Tokenizer.from_file(str(bundle.path("tokenizer/tokenizer.json")))
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
            special = msgspec.json.decode(
                _read_text(bundle, "tokenizer/config.json"), type=_SpecialTokens
            )
            sources = _read_templates(bundle)
            environment = _environment()
            self._templates = {
                name: environment.from_string(source) for name, source in sources.items()
            }
        except Exception as error:  # noqa: BLE001  the tokenizers raise no narrower type
            raise BundleError(
                f"the tokenizer of {bundle.folder} does not load: {error}; export the bundle again"
            ) from None
        tokens = msgspec.structs.asdict(special)
        self._variables = {name: token for name, token in tokens.items() if token is not None}
        self._letter_ids = self._tokenizer.encode(LETTER, add_special_tokens=False).ids
        self._start_ids = _start_ids(self._tokenizer)
        self._special_ids = frozenset(
            token_id
            for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        )
        self._control_tokens = ControlTokens(self._tokenizer, "\n".join(sources.values()))
        self.grammars = bundle_grammars(bundle)

    def encode(self, prompt: PromptRequest, max_tokens: int | None = None) -> list[int]:
        """Return the token ids of a request: a text to continue, or a conversation.

        A text with many more than `max_tokens` is refused after a part of the work; another text
        may still have more.

        Raises:
            PromptError: the model has no template, its template refuses the conversation, or the
                text is too long.
        """
        if self.continues_text(prompt):
            text = prompt.prompt or ""
            self._check_length(text, max_tokens, self._control_tokens.encode_raw)
            return self._encode_text(text, is_raw=prompt.raw)
        rendered = self._render(prompt.chat, prompt.tools, prompt.documents)
        self._check_length(rendered, max_tokens, self._control_tokens.encode)
        return self._encode_rendered(rendered)

    def _check_length(
        self, text: str, max_tokens: int | None, encode: Callable[[str], list[int]]
    ) -> None:
        """Check a long text by its beginning, then by `GROWTH` times as much.

        No number of characters bounds that of tokens: they may stand for long runs of blanks, or
        for any word.
        """
        if max_tokens is None:
            return
        length = max_tokens * CHARACTERS_PER_TOKEN
        while length * GROWTH < len(text):
            if len(encode(text[:length])) > max_tokens + CUT_TOKENS:
                raise PromptError(
                    f"the prompt has {len(text):,} characters, more than {max_tokens:,} tokens of "
                    "this model can hold; send a shorter prompt"
                )
            length *= GROWTH

    def continues_text(self, prompt: PromptRequest) -> bool:
        """Return whether the response to a request continues the text of its prompt."""
        return prompt.raw or not (self._templates or prompt.needs_template)

    def encode_chat(
        self,
        messages: Iterable[ChatMessage],
        tools: Sequence[JsonObject] | None = None,
        documents: Sequence[JsonObject] | None = None,
    ) -> list[int]:
        """Return the token ids of a conversation, ready for the assistant's message.

        Raises:
            PromptError: the model has no template, or its template refuses the conversation or
                makes no text of it.
        """
        return self._encode_rendered(self._render(messages, tools, documents))

    def _encode_rendered(self, rendered: str) -> list[int]:
        ids = self._control_tokens.encode(rendered)
        if not ids:
            raise PromptError(
                "the model's chat template makes an empty prompt of these messages; "
                "export the bundle again with another template"
            )
        return ids

    def _encode_text(self, text: str, *, is_raw: bool) -> list[int]:
        """Return the token ids of a text to continue, after the tokens that begin each text.

        A raw text may begin with these tokens itself.
        """
        tokens = self._control_tokens
        ids = tokens.encode_raw(text) if is_raw else tokens.encode(tokens.shield(text))
        if not ids:
            raise PromptError("the model's tokenizer makes no tokens of this text; send another")
        has_start = ids[: len(self._start_ids)] == self._start_ids
        return ids if has_start else [*self._start_ids, *ids]

    def _render(
        self,
        messages: Iterable[ChatMessage],
        tools: Sequence[JsonObject] | None,
        documents: Sequence[JsonObject] | None,
    ) -> str:
        """Return a conversation as text, whose names of control tokens are shielded."""
        template = self._template(has_tools=tools is not None)
        shield = self._control_tokens.shield
        try:
            return template.render(
                messages=[self._turn(message) for message in messages],
                tools=shield(tools),
                documents=shield(documents),
                add_generation_prompt=True,
                **self._variables,
            )
        except Exception as error:  # noqa: BLE001  a template raises errors of any type
            text = self._control_tokens.restore(str(error))
            reason = " ".join(text.split()) or type(error).__name__
            raise PromptError(
                f"the model's chat template refuses these messages: {reason[:MAX_REASON]}"
            ) from None

    def _template(self, *, has_tools: bool) -> jinja2.Template:
        """Return the template for conversations with tools, or without, as transformers does."""
        if not self._templates:
            raise PromptError(
                "this model has no chat template and continues a text: expected 'prompt' with its "
                "beginning, got 'messages', 'tools' or 'documents'; send 'prompt' without these"
            )
        if has_tools and TOOL_TEMPLATE in self._templates:
            return self._templates[TOOL_TEMPLATE]
        return self._templates[CHAT_TEMPLATE]

    def _turn(self, message: ChatMessage) -> JsonObject:
        """Return a message as templates read it: a field without a value is left out."""
        fields = msgspec.structs.asdict(message)
        given = {name: value for name, value in fields.items() if value is not None}
        tokens = self._control_tokens
        turn: JsonObject = tokens.shield(given)
        if message.content is not None:
            is_assistant = message.role == "assistant"
            turn["content"] = tokens.shield_message(message.content, is_assistant=is_assistant)
        return turn

    def token_text(self, token_id: int) -> str:
        """Return the text of one token alone; the name of a control token."""
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text

    def stream(self, prompt: PromptRequest | None = None) -> TextStream:
        """Return a stream of the text of a response; to `prompt`, if that is given."""
        is_continuation = prompt is not None and self.continues_text(prompt)
        before = self._letter_ids if is_continuation else ()
        return TextStream(self._tokenizer, self._special_ids, before)


class TextStream:
    """A conversion of tokens to text that holds back what a later token may change.

    That is an incomplete character, and a run of byte tokens (``<0x0A>``), which the decoder of
    such tokenizers turns into text as a whole. The pieces together are the decoded text.

    The tokens `before` are those of a text that the stream continues: decoders remove the space
    before the first token of a text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        special_ids: frozenset[int] = frozenset(),
        before: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        self._ids = list(before)
        self._length = 0  # characters of all pieces
        # The newest tokens, from `_start` on, are decoded again with each token that follows:
        # decoders treat the first token of a text differently. `_shown` is their known text.
        self._start = 0
        self._shown = self._decode(0)
        self._num_before = len(self._shown)

    @property
    def text(self) -> str:
        """The text of all tokens so far."""
        return self._decode(0)[self._num_before :]

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


def _start_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that a tokenizer puts before each text, such as the beginning of a text."""
    encoding = tokenizer.encode(LETTER)
    pairs = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    return [token_id for token_id, _ in takewhile(lambda pair: pair[1], pairs)]


def _read_text(bundle: Bundle, name: str) -> str:
    return bundle.path(name).read_text(encoding="utf-8")


def _read_templates(bundle: Bundle) -> dict[str, str]:
    """Return the bundle's chat templates by the names of their files."""
    names = [name for name in (CHAT_TEMPLATE, TOOL_TEMPLATE) if bundle.manifest.has_file(name)]
    return {name: _read_text(bundle, name) for name in names}


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
    text = json.dumps(
        value,
        ensure_ascii=False,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
    if not ensure_ascii:
        return text
    # Not with `ensure_ascii` of json, which would also escape the names of control tokens.
    return NOT_ASCII.sub(lambda match: json.dumps(match[0])[1:-1], text)


def _strftime_now(form: str) -> str:
    now = datetime.now().astimezone()
    return now.replace(tzinfo=None).strftime(form)  # without a zone, as in transformers


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
