"""The pages of docs/ say what the code says."""

import re
from pathlib import Path

import pytest

from fleet.protocol.access import RULES
from fleet.protocol.messages import ContextChunk, Message
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import PromptRequest, Reply, Usage
from fleet.protocol.report import DeviceStatus, GenerationReport, ReportReceipt, WorkerStatus
from fleet.protocol.session import LEGAL
from fleet.protocol.triggers import Trigger

ROOT = Path(__file__).parents[2]
PROTOCOL = (ROOT / "docs/protocol.md").read_text()
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()
PACKAGES = ("fleet", "edge_agent", "cloud_broker_worker", "onnx_export", "provisioning")
MODULES = [
    path
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if not path.stem.startswith("__")
]
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]


def test_the_protocols_state_table_is_the_codes() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `(\w+)` \|$", PROTOCOL, re.MULTILINE)
    assert {(state, event): following for state, event, following in rows} == LEGAL


@pytest.mark.parametrize("message", Message.__args__, ids=lambda message: message.__name__)
def test_the_protocol_lists_every_field_of_every_message(message: type[Message]) -> None:
    name = message.__name__.lower()
    table = re.search(rf"^\| `{name}` \| .*\n(?:\| \| .*\n)*", PROTOCOL, re.MULTILINE)
    assert table
    fields = [line.split("|")[2].strip(" `") for line in table[0].splitlines()]
    assert tuple(fields) == message.__struct_fields__


def test_the_protocol_lists_every_field_of_a_chunk() -> None:
    table = re.search(
        r"^### Chunks\n(?:[^|].*\n|\n)*\|.*\n\|---.*\n((?:\|.*\n)*)", PROTOCOL, re.MULTILINE
    )
    assert table
    fields = [line.split("|")[1].strip(" `") for line in table[1].splitlines()]
    assert tuple(fields) == ContextChunk.__struct_fields__


@pytest.mark.parametrize(
    "kind",
    [
        PromptRequest,
        Reply,
        Usage,
        Trigger,
        DeviceStatus,
        WorkerStatus,
        GenerationReport,
        ReportReceipt,
    ],
)
def test_the_protocol_names_every_field_of_what_apps_and_reports_hold(
    kind: type[PromptRequest],
) -> None:
    assert [field for field in kind.__struct_fields__ if f"`{field}`" not in PROTOCOL] == []


def test_the_protocol_lists_every_topic_that_anybody_may_use() -> None:
    listed = re.findall(r"^\| `((?:d|w|e|fleet|open)/[^`]*)` \|", PROTOCOL, re.MULTILINE)
    shapes = {re.sub(r"<\w+>", "+", topic) for topic in listed}
    used = {
        re.sub(r"{\w+}", "+", rule)
        for rules in RULES.values()
        for role in rules.values()
        for rule in role
    }
    assert used == shapes


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_tree_lists_every_module(path: Path) -> None:
    package = re.search(
        rf"^{path.relative_to(ROOT).parts[0]}/.*?\n\n", ARCHITECTURE, re.MULTILINE | re.DOTALL
    )
    assert package
    assert re.search(rf" {path.name}\b", package[0]), f"add {path.name} to docs/architecture.md"


def test_the_tree_lists_no_module_that_is_gone() -> None:
    tree = ARCHITECTURE.split("```")[1]
    assert set(re.findall(r"[\w]+\.py", tree)) == {path.name for path in MODULES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert [
        link
        for link in links
        if not link.startswith("https://") and not (page.parent / link).exists()
    ] == []


def test_the_functions_that_a_token_passes_exist() -> None:
    source = "\n".join(path.read_text() for path in MODULES)
    steps = ARCHITECTURE.split("## One token")[1]
    named = {
        name for dotted in re.findall(r"`([\w.]+)`", steps) for name in [dotted.split(".")[-1]]
    }
    words = {*Mode, "open", "opened", "context", "gap", "assist", "token", "cloud", "fallback"}
    assert [
        name for name in sorted(named - words) if not re.search(rf"(def|class) {name}\b", source)
    ] == []
