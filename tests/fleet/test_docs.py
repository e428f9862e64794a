"""The pages agree with the code, and with each other."""

import re
import shlex
import tomllib
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

import cloud_broker_worker.worker.cli
import edge_agent.cli
import fleet.cli
import onnx_export.__main__
from edge_agent.config import AgentConfig
from fleet.protocol.access import RULES
from fleet.protocol.desired_config import Settings
from fleet.protocol.messages import ContextChunk, Message
from fleet.protocol.modes import DEFAULT_AGREEMENT
from fleet.protocol.prompt import PromptRequest, Reply, Usage
from fleet.protocol.report import DeviceStatus, GenerationReport, ReportReceipt, WorkerStatus
from fleet.protocol.session import LEGAL
from fleet.protocol.topics import PREFIX
from fleet.protocol.triggers import Trigger

ROOT = Path(__file__).parents[2]
PROTOCOL = (ROOT / "docs/protocol.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
PACKAGES = ("fleet", "edge_agent", "cloud_broker_worker", "onnx_export", "provisioning")
MODULES = [
    path
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if not path.stem.startswith("__")
]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
GUIDE = (ROOT / "docs/operator-guide.md").read_text(encoding="utf-8")
SITE = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAX_README_WORDS = 900
ONLY_IN_SCOPES = {"bundle", "software", "threshold"}
IN_WORDS = {
    *ONLY_IN_SCOPES,
    "locked",
    "thresholds",
    "target_tpot_ms",
    "min_agreement",
    "max_offload_rate",
    "triggers",
    "num_threads",
    "system_prompt",
}
"""Settings whose default the guide gives in words."""

LINK = re.compile(r"\]\(([^)\s]+)\)")
PROGRAMS = {
    "fleet": fleet.cli.app,
    "edge-agent": edge_agent.cli.app,
    "python -m cloud_broker_worker": cloud_broker_worker.worker.cli.app,
}
COMMAND = re.compile(rf"^(?:{'|'.join(PROGRAMS)}) [a-z].*$")


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


def test_the_protocol_lists_every_topic_that_a_role_may_use() -> None:
    listed = re.findall(r"^\| `((?:d|w|e|fleet|open)/[^`]*)` \|", PROTOCOL, re.MULTILINE)
    shapes = {re.sub(r"<\w+>", "+", topic) for topic in listed}
    used = {
        re.sub(r"{\w+}", "+", rule).removeprefix(f"{PREFIX}/")
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


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[str]:
    found = LINK.findall(without_code(page.read_text(encoding="utf-8")))
    return [link for link in found if not link.startswith(("https://", "http://"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    files = [link.partition("#")[0] for link in links(page)]
    assert [file for file in files if not (page.parent / file).exists()] == []


def forge_anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def site_anchor(heading: str) -> str:
    """Return the anchor that the site gives a heading, as Python-Markdown does."""
    ascii_text = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    kept = re.sub(r"[^\w\s-]", "", ascii_text).strip().lower()
    return re.sub(r"[-\s]+", "-", kept)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page that are the same on a forge and in the site."""
    headings = re.findall(
        r"^#+ (.*)$", without_code(page.read_text(encoding="utf-8")), re.MULTILINE
    )
    plain = [re.sub(r"`|\*|\]\([^)]*\)|\[", "", heading) for heading in headings]
    return {forge_anchor(heading) for heading in plain} & {
        site_anchor(heading) for heading in plain
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_heading_leads_to_one(page: Path) -> None:
    targets = [link.partition("#") for link in links(page) if "#" in link]
    assert [
        f"{file}#{anchor}"
        for file, _, anchor in targets
        if anchor not in anchors(page.parent / file if file else page)
    ] == []


def navigated(entry: Any) -> set[str]:
    """Return the pages and folders that an entry of the site's navigation names."""
    if isinstance(entry, str):
        return {entry}
    entries = entry.values() if isinstance(entry, dict) else entry
    return {page for each in entries for page in navigated(each)}


def test_the_sites_navigation_has_every_page() -> None:
    entries = navigated(SITE["nav"])
    folders = tuple(entry for entry in entries if entry.endswith("/"))
    pages = {str(page.relative_to(ROOT)) for page in PAGES}
    assert {page for page in pages if not page.startswith(folders)} == entries - set(folders)


def test_the_index_leads_to_every_page_of_the_folder() -> None:
    index = ROOT / "docs/README.md"
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {index.name}
    assert pages <= {link.partition("#")[0] for link in links(index)}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= MAX_README_WORDS


def test_the_glossary_is_alphabetical() -> None:
    glossary = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    words = re.findall(r"^### (.*)$", glossary, re.MULTILINE)
    assert words == sorted(words, key=str.lower)


def test_the_citation_has_the_projects_version_and_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"][0]["name"] in (ROOT / "LICENSE").read_text(encoding="utf-8")


def settings_table(heading: str) -> dict[str, str]:
    """Return the defaults that a table of the operator's guide gives, by setting."""
    table = GUIDE.split(f"| {heading} | default | meaning |")[1].split("\n\n")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.MULTILINE))


def test_the_guide_lists_every_setting_where_it_can_be_set() -> None:
    live = settings_table("setting").keys()
    assert live == set(Settings.__struct_fields__)
    own = settings_table("setting of `agent.json` only").keys()
    assert own | live == {*AgentConfig.__struct_fields__, *ONLY_IN_SCOPES}


def test_the_guide_gives_the_defaults_of_the_code() -> None:
    tables = settings_table("setting") | settings_table("setting of `agent.json` only")
    written = {name: text.strip("`") for name, text in tables.items() if name not in IN_WORDS}
    values = {name: getattr(AgentConfig(), name) for name in written}
    assert written == {
        name: f"{value:g}" if isinstance(value, float) else str(value)
        for name, value in values.items()
    }
    assert tables["min_agreement"] == str(DEFAULT_AGREEMENT)


def commands(page: Path) -> list[str]:
    """Return the commands of this project that a page has, in blocks and between text."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", without_code(text))]
    return [line for line in [*lines, *inline] if COMMAND.match(line)]


@cache
def top_command(program: str) -> Any:
    return typer.main.get_command(PROGRAMS[program])


def unknown_words(line: str) -> list[str]:
    """Return the commands and options of a line that the program does not have."""
    program = next(name for name in PROGRAMS if line.startswith(f"{name} "))
    command = top_command(program)
    words = shlex.split(line.removeprefix(program))
    while words and hasattr(command, "commands"):
        if words[0] not in command.commands:
            return words[:1]
        command = command.commands[words.pop(0)]
    if command.name == "export":
        command = typer.main.get_command(onnx_export.__main__.app)
    elif command.context_settings.get("ignore_unknown_options"):
        return []
    options = {"--help"}
    for parameter in command.params:
        options.update(parameter.opts, parameter.secondary_opts)
    return [word for word in words if word.startswith("--") and word.split("=")[0] not in options]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_on_the_pages_exist_and_have_their_options(page: Path) -> None:
    unknown = {line: words for line in commands(page) if (words := unknown_words(line))}
    assert unknown == {}


def test_a_command_or_an_option_that_does_not_exist_is_found() -> None:
    assert unknown_words("fleet frobnicate kitchen") == ["frobnicate"]
    assert unknown_words("fleet stats kitchen --frobnicate") == ["--frobnicate"]
