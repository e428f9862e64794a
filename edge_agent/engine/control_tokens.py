"""Control tokens: a chat template may write them, the text of a message may not."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer

from fleet.errors import PromptError

# Unicode's noncharacters stand for no text; they are removed from messages.
HOLDER: Final = "\ufdd0"  # encloses the number of a control token's name inside a message
ALIAS: Final = "\ufdd1"  # encloses the number of a control token of the template
BREAK: Final = "\ufdd2"  # splits a name that the tokenizer would recognise; it has no id
MARKS: Final = re.compile(f"[{HOLDER}{ALIAS}{BREAK}]")
HELD: Final = re.compile(f"{HOLDER}(\\d+){HOLDER}")
UNKNOWN: Final = "\U0010fffd"  # a character that no vocabulary has


class ControlTokens:
    """The control tokens of a tokenizer, which it then recognises in the template's text only.

    Each control token gets an alias, and the tokenizer no longer recognises special tokens by
    their names. In a rendered conversation, the names that the template wrote become aliases; the
    names in messages were shielded before, and become ordinary text.

    Control tokens are all special tokens. Other added tokens, such as ``<think>``, are control
    tokens if the template writes them, but not in messages of the assistant: templates search
    these for them.
    """

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        """Change `tokenizer` as described; `template` is the source of all chat templates."""
        self._tokenizer = tokenizer
        added = {
            token_id: token
            for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items())
            if token.special or (token.content.strip() and token.content in template)
        }
        self._numbers = {token.content: i for i, token in enumerate(added.values())}
        self._names = _pattern(token.content for token in added.values())
        self._special_names = _pattern(token.content for token in added.values() if token.special)
        self._beginnings = frozenset(
            name[:length] for name in self._numbers for length in range(1, len(name))
        )
        self._max_beginning = max(map(len, self._beginnings), default=0)
        tokenizer.encode_special_tokens = True
        tokenizer.add_tokens([_added_token(BREAK)])
        tokenizer.add_tokens(
            [_added_token(self._alias(token.content), token) for token in added.values()]
        )
        self._ids = {
            tokenizer.token_to_id(self._alias(token.content)): token_id
            for token_id, token in added.items()
        }
        self._break_id = tokenizer.token_to_id(BREAK)
        self._forbidden = added.keys() - set(self._encode(UNKNOWN))
        self._as_text = [self._ordinary_text(token.content, i) for i, token in added.items()]

    def shield(self, value: Any) -> Any:
        """Return a text, or a value of JSON, with the names of control tokens in it replaced."""
        if isinstance(value, str):
            return self._shield_text(value, self._names)
        if isinstance(value, dict):
            return {self.shield(key): self.shield(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.shield(item) for item in value]
        return value

    def shield_message(self, text: str, *, is_assistant: bool) -> str:
        """Return the text of a message with the names of control tokens in it replaced.

        In the assistant's text these are the names of special tokens alone. A text that ends like
        the beginning of a name ends with a mark: templates may put the next message behind it.
        """
        names = self._special_names if is_assistant else self._names
        shielded = self._shield_text(text, names)
        end = len(shielded.rstrip())  # templates remove these blanks
        lengths = range(1, min(end, self._max_beginning) + 1)
        if not any(shielded[end - length : end] in self._beginnings for length in lengths):
            return shielded
        return f"{shielded[:end]}{BREAK}{shielded[end:]}"

    def _shield_text(self, text: str, names: re.Pattern[str]) -> str:
        return names.sub(
            lambda match: f"{HOLDER}{self._numbers[match[0]]}{HOLDER}", MARKS.sub("", text)
        )

    def restore(self, text: str) -> str:
        """Return a text that was made of shielded values, with the names back in place."""
        names = list(self._numbers)
        return HELD.sub(lambda match: names[int(match[1])], text.replace(BREAK, ""))

    def encode_raw(self, text: str) -> list[int]:
        """Return the token ids of a text in which names of control tokens are control tokens.

        Raises:
            PromptError: the text makes a control token in another way.
        """
        return self.encode(MARKS.sub("", text))

    def encode(self, rendered: str) -> list[int]:
        """Return the token ids of a rendered conversation, or another text, that was shielded.

        Raises:
            PromptError: a message makes a control token in another way.
        """
        aliased = self._names.sub(lambda match: self._alias(match[0]), rendered)
        text = HELD.sub(lambda match: self._as_text[int(match[1])], aliased)
        ids = [token_id for token_id in self._encode(text) if token_id != self._break_id]
        forged = self._forbidden.intersection(ids)
        if forged:
            name = self._tokenizer.id_to_token(min(forged))
            raise PromptError(f"a message makes the control token {name!r}; change its text")
        return [self._ids.get(token_id, token_id) for token_id in ids]

    def _alias(self, name: str) -> str:
        return f"{ALIAS}{self._numbers[name]}{ALIAS}"

    def _ordinary_text(self, name: str, token_id: int) -> str:
        """Return a text that the tokenizer encodes as `name` without the control token."""
        is_recognised = token_id in self._encode(name)
        return f"{name[:1]}{BREAK}{name[1:]}" if is_recognised else name

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of any of the names, the longest first; without names it matches nothing."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _added_token(text: str, like: AddedToken | None = None) -> AddedToken:
    """Return a token that is recognised everywhere, with the blanks that `like` takes in."""
    return AddedToken(
        text,
        single_word=bool(like and like.single_word),
        lstrip=bool(like and like.lstrip),
        rstrip=bool(like and like.rstrip),
        normalized=False,
        special=False,
    )
