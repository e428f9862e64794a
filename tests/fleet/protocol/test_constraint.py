"""The fields of a prompt that ask for a form, and their errors."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fleet.errors import PromptError
from fleet.protocol.constraint import MAX_CONSTRAINT_BYTES, Constraint
from fleet.protocol.prompt import parse_prompt


def constraint_of(**fields: Any) -> Constraint | None:
    return parse_prompt(json.dumps({"prompt": "Hi"} | fields).encode()).constraint


def schema_of(schema: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "text"}, "regex": "a"}, Constraint("regex", b"a")),
        ({"regex": "é"}, Constraint("regex", "é".encode())),
        (
            {"response_format": {"type": "json_object"}},
            Constraint("json_schema", b'{"type":"object"}'),
        ),
        (
            {"response_format": schema_of({"type": "null"})},
            Constraint("json_schema", b'{"type":"null"}'),
        ),
    ],
)
def test_fields_become_a_constraint(fields: dict[str, Any], expected: Constraint | None) -> None:
    assert constraint_of(**fields) == expected


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


def test_a_schema_of_the_largest_depth_and_size_is_accepted() -> None:
    assert constraint_of(response_format=schema_of(nested(32)))
    assert constraint_of(response_format=schema_of({"x": "a" * (MAX_CONSTRAINT_BYTES - 8)}))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"response_format": schema_of(nested(33))}, "at most 32 levels .* got 33"),
    (
        {"response_format": schema_of({"x": "a" * (MAX_CONSTRAINT_BYTES - 7)})},
        "at most 32768 bytes of JSON, got 32769",
    ),
    ({"response_format": {"type": "json_schema"}}, "got the type 'json_schema' without it"),
    (
        {"response_format": {"type": "json_object", "json_schema": {"schema": {}}}},
        "got the type 'json_object' with it",
    ),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "schema"),
    ({"response_format": schema_of([])}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "text", "x": 1}}, "response_format"),
    ({"regex": ""}, "regex"),
    ({"regex": "a" * 4097}, "regex"),
    ({"regex": "a", "response_format": {"type": "json_object"}}, "got both"),
    ({"regex": "a", "ignore_eos": True}, "no 'ignore_eos' with 'regex'"),
]


@pytest.mark.parametrize(("fields", "reason"), BAD)
def test_a_form_that_cannot_be_is_refused_by_its_field(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(PromptError, match=reason):
        constraint_of(**fields)
