"""The tokens that a constraint allows, through drafts that come and go; constraints that fail."""

from __future__ import annotations

import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fleet.constraints.grammars import MAX_GRAMMARS, Grammars
from fleet.constraints.token_constraint import TokenConstraint
from fleet.errors import ConstraintError
from fleet.protocol.constraint import Constraint, Kind
from tests.tiny import VOCAB_SIZE, make_tiny_tokenizer

PROMPT = [4, 5, 6]
EOS = 2


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    make_tiny_tokenizer().save_pretrained(folder := tmp_path_factory.mktemp("tokenizer"))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def grammars(tokenizer_file: Path) -> Grammars:
    return Grammars(tokenizer_file, VOCAB_SIZE, (EOS,))


def ids(text: str) -> list[int]:
    encoded: list[int] = make_tiny_tokenizer().encode(text)
    return encoded


def regex(grammars: Grammars, pattern: str) -> TokenConstraint:
    return grammars.constrain(Constraint("regex", pattern.encode()), len(PROMPT))


def allowed(rule: TokenConstraint, answer: str) -> str:
    """The characters that may follow `answer`; $ stands for the end."""
    mask = rule.allowed(PROMPT + ids(answer))
    assert mask is not None
    return "".join(
        "$" if token_id == EOS else make_tiny_tokenizer().decode([token_id])
        for token_id in np.flatnonzero(mask)
    )


def test_only_characters_that_can_lead_to_a_match_are_allowed(grammars: Grammars) -> None:
    rule = regex(grammars, "(cat|cow)s?")
    assert allowed(rule, "") == "c"
    assert sorted(allowed(rule, "c")) == ["a", "o"]
    assert sorted(allowed(rule, "cow")) == ["$", "s"]


def test_a_complete_answer_may_only_end(grammars: Grammars) -> None:
    assert allowed(regex(grammars, "(cat|cow)s?"), "cats") == "$"


def test_drafts_come_and_go_in_any_order(grammars: Grammars) -> None:
    rule = regex(grammars, "(cat|cow|dog)")
    for answer in ("ca", "", "cow", "co", "d", "dog", "ca"):
        assert allowed(rule, answer) == allowed(regex(grammars, "(cat|cow|dog)"), answer)


def test_a_text_that_breaks_the_constraint_has_no_mask_and_does_no_harm(grammars: Grammars) -> None:
    rule = regex(grammars, "(cat|cow)")
    assert rule.allowed(PROMPT + ids("cut")) is None
    assert rule.num_allowed(PROMPT + ids("cut"), ids("s")) == 0
    assert allowed(rule, "ca") == "t"


@pytest.mark.parametrize(("proposed", "count"), [("at", 2), ("axt", 1), ("xat", 0), ("ats", 2)])
def test_a_copied_draft_is_cut_at_the_first_forbidden_token(
    grammars: Grammars, proposed: str, count: int
) -> None:
    assert regex(grammars, "cat").num_allowed(PROMPT + ids("c"), ids(proposed)) == count


def test_json_has_at_most_one_space_between_parts(grammars: Grammars) -> None:
    source = json.dumps({"type": "object", "properties": {"a": {"type": "null"}}}).encode()
    rule = grammars.constrain(Constraint("json_schema", source), len(PROMPT))
    assert allowed(rule, "") == "{"
    assert " " in allowed(rule, "{")
    assert " " not in allowed(rule, "{ ")
    assert "\n" not in allowed(rule, "{")


BAD: list[tuple[Kind, object, str]] = [
    ("regex", "(", "regex: .*unclosed group"),
    ("regex", "(?=x)y", "regex: .*look-around"),
    ("json_schema", {"type": "strin"}, "schema: .*strin"),
    ("json_schema", {"properties": 3}, "schema: properties must be an object"),
    ("json_schema", {"not": {}}, "schema: .*not"),
    ("json_schema", {"$ref": "http://example.com/x"}, "schema: .*not present"),
    ("json_schema", {"enum": []}, "schema: .*anyOf is empty"),
    ("json_schema", {"type": "integer", "multipleOf": 999983}, "schema: .*multiple .* got 999983"),
    ("json_schema", {"allOf": [{"multipleOf": 997}, {"multipleOf": 9.91}]}, "got 988027"),
    ("json_schema", "[" * 20_000, "schema: .*recursion"),
    ("json_schema", {"items": [{"multipleOf": 0.123457}]}, "got 123457"),
    ("json_schema", {"minimum": 5, "maximum": 3, "type": "number"}, "schema: .*greater than"),
    ("json_schema", {"type": "string", "pattern": "("}, "schema: .*unclosed group"),
]


@pytest.mark.parametrize(("kind", "source", "reason"), BAD, ids=[str(bad[1])[:30] for bad in BAD])
def test_a_constraint_that_cannot_be_compiled_is_refused_by_its_field(
    grammars: Grammars, kind: Kind, source: object, reason: str
) -> None:
    text = source if isinstance(source, str) else json.dumps(source)
    with pytest.raises(ConstraintError, match=reason) as caught:
        grammars.constrain(Constraint(kind, text.encode()), 0)
    assert "\n" not in str(caught.value)
    assert caught.value.code == "bad_prompt"


def test_multiples_are_allowed_where_few_remainders_exist(grammars: Grammars) -> None:
    source = {"anyOf": [{"type": "number", "multipleOf": each} for each in (100, 0.01, 7, 250000)]}
    rule = grammars.constrain(Constraint("json_schema", json.dumps(source).encode()), len(PROMPT))
    assert "7" in allowed(rule, "")


def test_a_grammar_is_compiled_while_another_one_is_used(
    tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars = Grammars(tokenizer_file, VOCAB_SIZE, (EOS,))
    regex(grammars, "a")

    def check(schema: str) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(regex, grammars, "a").result(10)

    monkeypatch.setattr("fleet.constraints.grammars._check_multiples", check)
    grammars.constrain(Constraint("json_schema", b'{"type": "null"}'), 0)


def test_a_constraint_that_turns_out_too_complex_is_an_error(grammars: Grammars) -> None:
    rule = regex(grammars, "(([a-z0-9]{1,30}){1,30}){1,30}")
    with pytest.raises(ConstraintError, match=r"regex is too complex: .*too many"):
        [rule.allowed(PROMPT + ids("k" * length)) for length in range(1, 40)]


def test_answers_that_use_up_the_states_of_a_grammar_do_not_fail_the_next_ones(
    tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleet.constraints.grammars.MAX_STATES", 400)
    grammars = Grammars(tokenizer_file, VOCAB_SIZE, (EOS,))
    draw = random.Random(0)
    for _ in range(4):
        rule = regex(grammars, "[ab]*a[ab]{12}(x|y)")
        answer = ""
        for _ in range(100):
            assert {"a", "b"} <= set(allowed(rule, answer))
            answer += draw.choice("ab")


def test_only_the_newest_grammars_are_kept(tokenizer_file: Path) -> None:
    grammars = Grammars(tokenizer_file, VOCAB_SIZE, (EOS,))
    for number in range(MAX_GRAMMARS + 5):
        regex(grammars, f"a{{{number + 1}}}")
    assert len(grammars._matchers) == MAX_GRAMMARS


def test_a_byte_level_decoder_in_a_sequence_is_understood(
    tokenizer_file: Path, tmp_path: Path
) -> None:
    content = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    content["decoder"] = {
        "type": "Sequence",
        "decoders": [{"type": "ByteFallback"}, content["decoder"]],
    }
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    rule = regex(Grammars(file, VOCAB_SIZE, (EOS,)), " é")
    assert allowed(rule, "") == " "
    assert allowed(rule, " é") == "$"


@pytest.mark.parametrize("content", [None, "no JSON", "{}"])
def test_a_tokenizer_that_cannot_be_read_is_an_error(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "tokenizer.json"
    if content:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(ConstraintError, match=r"cannot be used with .*tokenizer\.json"):
        regex(Grammars(file, VOCAB_SIZE, (EOS,)), "a")


def test_without_llguidance_the_error_names_the_package(
    tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConstraintError, match="llguidance, which is not installed"):
        regex(Grammars(tokenizer_file, VOCAB_SIZE, (EOS,)), "a")
