"""Grammars of constraints over a model's tokens, compiled by llguidance in bounded time."""

from __future__ import annotations

import json
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, Final

from fleet.bundles.manifest import Bundle
from fleet.constraints.token_constraint import TokenConstraint, brief_reason
from fleet.errors import ConstraintError
from fleet.protocol.constraint import Constraint

MAX_GRAMMARS: Final = 32  # compiled grammars that are kept
MAX_STATES: Final = 20_000  # of a grammar's lexer
MAX_COMMON_MULTIPLE: Final = 10_000  # a lexer has a state for each remainder of a `multipleOf`

# With unlimited white space an answer could reach its length without content.
JSON_OPTIONS: Final[Any] = {
    "whitespace_flexible": True,
    "whitespace_pattern": " ?",
    "coerce_one_of": True,
    "lenient": False,
}


NOT_INSTALLED: Final = (
    "'response_format' and 'regex' need llguidance, which is not installed; "
    "run: pip install llguidance"
)


class Grammars:
    """The constraints of one model's answers. Several threads may call it.

    The tokenizer is read when the first constraint comes. The newest compiled grammars are kept.
    """

    def __init__(self, tokenizer: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._compiler: _Compiler | None = None
        self._matchers = OrderedDict[Constraint, Any]()
        self._lock = threading.Lock()

    def constrain(self, constraint: Constraint, answer_start: int) -> TokenConstraint:
        """Return the constraint of one answer, which begins at the position `answer_start`.

        Raises:
            ConstraintError: the constraint or the tokenizer cannot be compiled, or llguidance is
                not installed.
        """
        with self._lock:
            matcher = self._matchers.get(constraint)
            if matcher:
                self._matchers.move_to_end(constraint)
                matcher = matcher.deep_copy()
        return TokenConstraint(
            matcher or self._renew(constraint),
            partial(self._renew, constraint),
            constraint,
            answer_start=answer_start,
            vocab_size=self._vocab_size,
        )

    def _renew(self, constraint: Constraint) -> Any:
        """Return a matcher of a grammar that is compiled again, while others are used.

        The copies of a matcher share the states of its lexer, whose number is limited.
        """
        matcher = self._loaded_compiler().compile(constraint)
        with self._lock:
            self._matchers[constraint] = matcher
            self._matchers.move_to_end(constraint)
            if len(self._matchers) > MAX_GRAMMARS:
                self._matchers.popitem(last=False)
            return matcher.deep_copy()

    def _loaded_compiler(self) -> _Compiler:
        with self._lock:
            if self._compiler is None:
                self._compiler = _Compiler(self._tokenizer, self._vocab_size, self._eos_token_ids)
            return self._compiler


def bundle_grammars(bundle: Bundle) -> Grammars:
    """Return the grammars of a bundle's model. A worker's copy has to have the tokenizer, too."""
    model = bundle.manifest.model
    file = bundle.folder / "tokenizer/tokenizer.json"
    return Grammars(file, model.vocab_size, model.eos_token_ids)


class _Compiler:
    """llguidance with the tokens of one model."""

    def __init__(self, tokenizer: Path, vocab_size: int, eos_token_ids: list[int]) -> None:
        try:
            import llguidance
        except ModuleNotFoundError:
            raise ConstraintError(NOT_INSTALLED) from None
        self._matcher: Any = llguidance.LLMatcher
        # A step of the worst grammar within these limits takes some tens of milliseconds.
        self._limits = llguidance.LLParserLimits(
            initial_lexer_fuel=200_000,
            step_lexer_fuel=100_000,
            max_lexer_states=MAX_STATES,
            max_grammar_size=50_000,
            verbose_errors=False,
        )
        try:
            text = with_plain_decoder(tokenizer.read_text(encoding="utf-8"))
            self._tokens = llguidance.LLTokenizer(text, n_vocab=vocab_size, eos_token=eos_token_ids)
        except (OSError, ValueError) as error:
            raise ConstraintError(
                f"'response_format' and 'regex' cannot be used with {tokenizer}: "
                f"{brief_reason(error)}; leave them out"
            ) from None

    def compile(self, constraint: Constraint) -> Any:
        """Return a matcher at the beginning of an answer. Raises ConstraintError."""
        try:
            grammar = self._grammar(constraint)
        except (ValueError, RecursionError) as error:
            raise ConstraintError(f"{constraint.field}: {brief_reason(error)}") from None
        matcher = self._matcher(self._tokens, grammar, log_level=0, limits=self._limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # some grammars turn out too complex only now
        if matcher.is_error():
            raise ConstraintError(f"{constraint.field}: {brief_reason(matcher.get_error())}")
        return matcher

    def _grammar(self, constraint: Constraint) -> str:
        text = constraint.source.decode()
        if constraint.kind == "regex":
            return str(self._matcher.grammar_from_regex(text))
        _check_multiples(text)
        return str(self._matcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS))


def _check_multiples(schema: str) -> None:
    """Check that the compilation of a schema's numbers ends soon.

    Raises:
        ValueError: the common multiple of all `multipleOf` is too large, or `schema` is no JSON.
    """
    common = math.lcm(*_multiples(json.loads(schema, parse_int=Decimal, parse_float=Decimal)))
    if common > MAX_COMMON_MULTIPLE:
        raise ValueError(
            f"expected 'multipleOf' with a common multiple of at most {MAX_COMMON_MULTIPLE}, "
            f"powers of 10 left out, got {common}"
        )


def _multiples(schema: Any) -> Iterator[int]:
    """Return the digits of each `multipleOf` in a schema, as integers."""
    waiting = [schema]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
            number = value.get("multipleOf")
            if isinstance(number, Decimal) and number:
                yield int("".join(map(str, number.normalize().as_tuple().digits)))
        elif isinstance(value, list):
            waiting += value


def with_plain_decoder(text: str) -> str:
    """Return a ``tokenizer.json`` in which a byte-level decoder stands alone.

    llguidance looks at the kind of the decoder to know the bytes of a token, and takes a sequence
    of decoders for one that replaces the sign of a space.
    """
    content = json.loads(text)
    decoder = content.get("decoder") or {}
    plain = [each for each in decoder.get("decoders", []) if each["type"] == "ByteLevel"]
    if not plain:
        return text
    content["decoder"] = plain[0]
    return json.dumps(content)
