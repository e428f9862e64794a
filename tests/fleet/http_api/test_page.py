"""docs/api.md has every path and every field, and those that are ignored or refused."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any, Final, get_type_hints

import pytest
from msgspec import Struct

import fleet.http_api
from edge_agent.local_api.api_keys import ApiKeys
from edge_agent.local_api.device_backend import DeviceBackend
from fleet.http_api import (
    chat_completions,
    ollama_answers,
    ollama_fields,
    responses,
    text_completions,
)
from fleet.http_api.application import HttpApi
from fleet.http_api.backend import ApiCaller
from fleet.http_api.chat_completions import ChatCompletionBody
from fleet.http_api.ollama_answers import OllamaChatBody, OllamaGenerateBody
from fleet.http_api.ollama_fields import OllamaOptions
from fleet.http_api.problems import Problem
from fleet.http_api.responses import ResponseBody
from fleet.http_api.text_completions import TextCompletionBody

ROOT: Final = Path(__file__).parents[3]
PAGE: Final = (ROOT / "docs/api.md").read_text(encoding="utf-8")
MODULES: Final[list[ModuleType]] = [
    importlib.import_module(f"fleet.http_api.{path.stem}")
    for path in Path(fleet.http_api.__file__).parent.glob("[a-z]*.py")
]
OLLAMA: Final = ollama_fields.NEUTRAL | ollama_answers.NEUTRAL
OLLAMA_BODIES: Final = (OllamaChatBody, OllamaGenerateBody)
INTERNAL: Final = (ApiCaller, Problem)
STRUCTS: Final = [
    kind
    for module in MODULES
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, Struct)
    if kind.__module__ == module.__name__ and kind not in INTERNAL
]


def section(title: str) -> str:
    """The text below a heading of the second level."""
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def listed(text: str, beginning: str, number: int = 0) -> set[str]:
    """The names in the paragraph that begins so; there may be several such paragraphs."""
    paragraphs = [each for each in text.split("\n\n") if each.startswith(beginning)]
    names, _, _ = paragraphs[number].removeprefix(beginning).partition(".")
    return set(re.findall(r"`(\w+)`", names))


@pytest.mark.parametrize("kind", STRUCTS, ids=lambda kind: kind.__name__)
def test_the_page_names_every_field(kind: type[Struct]) -> None:
    assert [field for field in kind.__struct_fields__ if f"`{field}`" not in PAGE] == []


def table_names(text: str, heading: str) -> set[str]:
    """The names in the first column of the table with this heading."""
    rows = text.split(f"| {heading} | meaning |\n")[1].split("\n\n")[0]
    cells = [row.split("|")[1] for row in rows.splitlines()]
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


@pytest.mark.parametrize(
    ("title", "heading", "kinds"),
    [
        ("Chat completions", "field of the request", (ChatCompletionBody,)),
        ("Text completions", "field of the request", (TextCompletionBody,)),
        ("Responses", "field of the request", (ResponseBody,)),
        ("Ollama", "field of the request", OLLAMA_BODIES),
        ("Ollama", "option", (OllamaOptions,)),
    ],
)
def test_the_table_of_a_request_has_its_fields_and_no_other(
    title: str, heading: str, kinds: tuple[type[Struct], ...]
) -> None:
    typed = {
        name for kind in kinds for name, type_ in get_type_hints(kind).items() if type_ is not Any
    }
    assert table_names(section(title), heading) == typed


def test_the_page_lists_every_path() -> None:
    routes = {
        f"{route.method} {route.path}"
        for route in HttpApi(DeviceBackend(lambda: None, ApiKeys())).routes()
    }
    table = "\n".join(re.findall(r"^\| (`[A-Z]+ /.*?) \|", PAGE, re.MULTILINE))
    names = set(re.findall(r"`([A-Z]+ /[^`]*)`", table.replace("NAME", "{name:.+}")))
    assert names == routes


@pytest.mark.parametrize(
    ("title", "number", "kinds", "neutral"),
    [
        ("Chat completions", 0, (ChatCompletionBody,), chat_completions.NEUTRAL),
        ("Text completions", 0, (TextCompletionBody,), text_completions.NEUTRAL),
        ("Responses", 0, (ResponseBody,), responses.NEUTRAL),
        ("Ollama", 0, OLLAMA_BODIES, OLLAMA),
        ("Ollama", 1, (OllamaOptions,), ollama_fields.NEUTRAL_OPTIONS),
    ],
)  # fmt: skip
def test_the_page_lists_what_is_ignored_and_what_is_refused(
    title: str, number: int, kinds: tuple[type[Struct], ...], neutral: dict[str, Any]
) -> None:
    untyped = {
        name for kind in kinds for name, type_ in get_type_hints(kind).items() if type_ is Any
    }
    text = section(title)
    refused = "Refused, unless the value changes nothing:"
    assert listed(text, refused, number) == neutral.keys()
    assert listed(text, "Ignored:", number) == untyped - neutral.keys()
