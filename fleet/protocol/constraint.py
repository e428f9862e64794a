"""The form that an answer must have: what a prompt asks for, and what a session carries."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from fleet.errors import PromptError

MAX_CONSTRAINT_BYTES: Final = 32 * 1024
MAX_REGEX_LENGTH: Final = 4096
MAX_SCHEMA_DEPTH: Final = 32
ANY_OBJECT: Final = {"type": "object"}
SCHEMA_FIELD: Final = "response_format.json_schema.schema"

Kind = Literal["json_schema", "regex"]
Regex = Annotated[str, Meta(min_length=1, max_length=MAX_REGEX_LENGTH)]


class Constraint(Struct, frozen=True, forbid_unknown_fields=True):
    """A JSON schema or a regular expression that the whole answer matches.

    `source` is its text in UTF-8.
    """

    kind: Kind
    source: Annotated[bytes, Meta(min_length=1, max_length=MAX_CONSTRAINT_BYTES)]

    @property
    def field(self) -> str:
        """The field of a prompt that asks for it, for errors."""
        return SCHEMA_FIELD if self.kind == "json_schema" else "regex"


class JsonSchemaFormat(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A JSON schema, as in OpenAI's API. Only `schema` has an effect: it is always strict."""

    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(
    Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """The form of an answer, as in OpenAI's API."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @property
    def schema(self) -> dict[str, Any] | None:
        """The schema that the answer matches, if there is one.

        Raises:
            PromptError: `type` and `json_schema` contradict each other.
        """
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PromptError(
                "expected 'response_format.json_schema' exactly with the type 'json_schema', got "
                f"the type {self.type!r} {'with' if self.json_schema else 'without'} it"
            )
        if self.json_schema:
            return self.json_schema.schema
        return ANY_OBJECT if self.type == "json_object" else None


def make_constraint(response_format: ResponseFormat | None, regex: str | None) -> Constraint | None:
    """Return the constraint that the fields of a prompt ask for, or None.

    Raises:
        PromptError: both fields ask for one, or the schema is too large or too deep.
    """
    schema = response_format.schema if response_format else None
    if regex is None:
        return None if schema is None else Constraint("json_schema", _encode_schema(schema))
    if schema is not None:
        raise PromptError("expected one of 'response_format' and 'regex', got both; leave one out")
    return Constraint("regex", regex.encode())


def _encode_schema(schema: dict[str, Any]) -> bytes:
    depth = _depth(schema)
    if depth > MAX_SCHEMA_DEPTH:
        raise PromptError(
            f"{SCHEMA_FIELD}: expected at most {MAX_SCHEMA_DEPTH} levels of objects and arrays, "
            f"got {depth}; use '$defs' and '$ref', or a flatter schema"
        )
    source = msgspec.json.encode(schema)
    if len(source) > MAX_CONSTRAINT_BYTES:
        raise PromptError(
            f"{SCHEMA_FIELD}: expected at most {MAX_CONSTRAINT_BYTES} bytes of JSON, "
            f"got {len(source)}; use a smaller schema"
        )
    return source


def _depth(value: Any) -> int:
    """Return the number of levels of objects and arrays, without recursion."""
    depth = 0
    level = [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [item for each in level for item in _items(each)]
    return depth


def _items(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value
