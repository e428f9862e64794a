"""Measure the code against the house rules, print each figure with its limit, fail if one is over.

Run it from anywhere: ``python scripts/measure_code.py [--list]``. It needs Python's standard
library alone. With ``--list`` it also prints where each violation is.

The rules on form (nodes, functions, calls) hold for the five packages; the rules on language and
line length hold for every tracked Python file and for the documentation.
"""

from __future__ import annotations

import ast
import io
import re
import statistics
import subprocess
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fleet", "edge_agent", "cloud_broker_worker", "onnx_export", "provisioning")
MAX_COLUMNS = 100
OPENING = re.compile(r"\s*(?:What|Who|Whose|Which|Where|How|Those|Of)\b")
# Spelled in two halves, so that this file passes its own check.
BANNED_WORDS = re.compile(
    r"\b(?:" + "|".join(("no", "some", "every", "any")) + r")body\b|\bwho" + r"ever\b", re.I
)
UNCOUNTED_NODES = (
    ast.expr_context,
    ast.operator,
    ast.cmpop,
    ast.boolop,
    ast.unaryop,
    ast.arg,
    ast.arguments,
    ast.keyword,
    ast.alias,
)
LAYOUT_TOKENS = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One Python file, parsed."""

    path: Path
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @property
    def module(self) -> str:
        """The dotted name: ``fleet.cli`` for fleet/cli/__init__.py."""
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def is_product(self) -> bool:
        return self.path.relative_to(ROOT).parts[0] in PACKAGES

    def docstrings(self) -> Iterator[ast.Constant]:
        for node in self.nodes:
            if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node):
                statement = node.body[0]
                assert isinstance(statement, ast.Expr)
                assert isinstance(statement.value, ast.Constant)
                yield statement.value

    def num_code_lines(self) -> int:
        """Lines that hold a token; comments and docstrings do not count."""
        lines: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type not in LAYOUT_TOKENS:
                lines.update(range(token.start[0], token.end[0] + 1))
        for docstring in self.docstrings():
            lines.difference_update(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
        return len(lines)


@dataclass
class Figure:
    """One measured value, its limit, and the places that count towards it."""

    name: str
    value: float
    limit: float
    places: list[str] = field(default_factory=list)

    @property
    def is_kept(self) -> bool:
        return self.value <= self.limit


def place(path: Path, line: int, what: str) -> str:
    return f"{path.relative_to(ROOT)}:{line}: {what[:MAX_COLUMNS]}"


def tracked(*patterns: str) -> list[Path]:
    """Files that git knows or would add, by pattern."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.splitlines() if (ROOT / name).is_file()]


def listed(name: str, places: Iterable[str]) -> Figure:
    """A rule without exceptions."""
    found = list(places)
    return Figure(name, len(found), 0, found)


def openings(sources: Iterable[Source]) -> Iterator[str]:
    """Docstrings and help texts that begin with a question word."""
    for source in sources:
        texts = list(source.docstrings())
        for node in source.nodes:
            if isinstance(node, ast.keyword) and node.arg in ("help", "description", "epilog"):
                texts += [part for part in ast.walk(node.value) if isinstance(part, ast.Constant)][
                    :1
                ]
        for text in texts:
            if OPENING.match(str(text.value)):
                yield place(source.path, text.lineno, str(text.value).strip().splitlines()[0])


def banned_words(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if BANNED_WORDS.search(line.replace("_", " ")):
                yield place(path, number, line.strip())


def long_lines(name: str, paths: Iterable[Path]) -> Figure:
    """The share of lines that are too long, in percent."""
    num_lines = 0
    places = []
    for path in paths:
        lines = path.read_text().splitlines()
        num_lines += len(lines)
        places += [
            place(path, number, f"{len(line)} columns")
            for number, line in enumerate(lines, 1)
            if len(line) > MAX_COLUMNS
        ]
    return Figure(name, 100 * len(places) / num_lines, 1.0, places)


def calls_by_position(sources: Iterable[Source]) -> Iterator[str]:
    for source in sources:
        for node in source.nodes:
            if isinstance(node, ast.Call) and len(node.args) >= 6:
                yield place(source.path, node.lineno, ast.unparse(node.func))


def tuple_assignments(sources: Iterable[Source]) -> Iterator[str]:
    """Statements ``a, b = x, y``; unpacking the result of a call is none."""
    for source in sources:
        for node in source.nodes:
            if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
                continue
            if isinstance(node.targets[0], ast.Tuple):
                yield place(source.path, node.lineno, ast.unparse(node))


def repeated_names(sources: Iterable[Source]) -> Iterator[str]:
    """Public classes and functions of modules that have the name of another."""
    places: defaultdict[str, list[str]] = defaultdict(list)
    for source in sources:
        for node in source.tree.body:
            if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
                places[node.name].append(place(source.path, node.lineno, node.name))
    # Alembic calls these, one in each migration; `main` and `options` are the doors of programs.
    for name, where in sorted(places.items()):
        if len(where) > 1 and name not in ("upgrade", "main"):
            yield from where


def imports(source: Source, modules: set[str]) -> set[str]:
    """Modules of the project that a file imports, at whatever place in it."""
    found: set[str] = set()
    for node in source.nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(name if name in modules else node.module for name in names)
    return found & modules - {source.module}


def cycles(graph: dict[str, set[str]]) -> Iterator[str]:
    """Nodes on a cycle or between two: those that stay when all others have been taken away.

    A node without an arrow to the rest is on no cycle, and neither is one without an arrow from it.
    """
    while graph:
        targets = set().union(*graph.values())
        free = {node for node, arrows in graph.items() if not arrows or node not in targets}
        if not free:
            break
        graph = {node: arrows - free for node, arrows in graph.items() if node not in free}
    for node, arrows in sorted(graph.items()):
        yield f"{node} imports {', '.join(sorted(arrows))}"


def import_graph(sources: list[Source]) -> dict[str, set[str]]:
    modules = {source.module for source in sources}
    return {source.module: imports(source, modules) for source in sources}


def room_cycles(graph: dict[str, set[str]]) -> Iterator[str]:
    """Cycles between the children of each package, files and subpackages alike.

    A package's ``__init__`` is its door and stands for no child.
    """
    packages = {name.rpartition(".")[0] for name in graph} - {""}
    for package in sorted(packages):
        child = re.compile(re.escape(package) + r"\.\w+")
        rooms: dict[str, set[str]] = defaultdict(set)
        for module, imported in graph.items():
            if room := child.match(module):
                targets = [child.match(name) for name in imported]
                rooms[room[0]] |= {target[0] for target in targets if target} - {room[0]}
        yield from cycles(rooms)


def import_strings(sources: Iterable[Source]) -> Iterator[str]:
    """Calls that import a module by its name as a string."""
    for source in sources:
        for node in source.nodes:
            if isinstance(node, ast.Call):
                function = ast.unparse(node.func).rpartition(".")[2]
                if function in ("import_module", "__import__"):
                    yield place(source.path, node.lineno, ast.unparse(node))


def function_lines(sources: Iterable[Source]) -> list[int]:
    """Lines of each function, signature and docstring included, in ascending order."""
    return sorted(
        (node.end_lineno or 0) - node.lineno + 1
        for source in sources
        for node in source.nodes
        if isinstance(node, Function)
    )


def measure(sources: list[Source]) -> list[Figure]:
    product = [source for source in sources if source.is_product]
    paths = [source.path for source in sources]
    docs = tracked("*.md")
    num_lines = sum(source.num_code_lines() for source in product)
    num_nodes = sum(
        not isinstance(node, UNCOUNTED_NODES) for source in product for node in source.nodes
    )
    lengths = function_lines(product)
    positional = list(calls_by_position(product))
    tuples = list(tuple_assignments(product))
    graph = import_graph(product)
    return [
        listed("docstrings and help texts that open with a question word", openings(sources)),
        listed("lines with a banned pronoun, source and docs", banned_words([*paths, *docs])),
        long_lines("% of source lines over 100 columns", paths),
        long_lines("% of documentation lines over 100 columns", docs),
        Figure("syntax nodes a code line", num_nodes / num_lines, 5.0),
        Figure("lines of a function, median", statistics.median(lengths), 7),
        Figure("lines of a function, 90th percentile", lengths[int(0.9 * len(lengths))], 20),
        Figure(
            "calls with 6 or more positional arguments, per 1,000 code lines",
            1000 * len(positional) / num_lines,
            0.7,
            positional,
        ),
        Figure(
            "tuple assignments, per 1,000 code lines", 1000 * len(tuples) / num_lines, 1.5, tuples
        ),
        listed("public classes and functions that share a name", repeated_names(product)),
        listed("modules on an import cycle", cycles(graph)),
        listed("rooms on an import cycle", room_cycles(graph)),
        listed("imports by string", import_strings(product)),
    ]


def main() -> int:
    sources = [Source(path, path.read_text()) for path in tracked("*.py")]
    figures = measure(sources)
    for figure in figures:
        mark = "ok  " if figure.is_kept else "OVER"
        print(f"{mark} {figure.value:8.2f}  (at most {figure.limit:g})  {figure.name}")
        if "--list" in sys.argv[1:] or (not figure.is_kept and figure.limit == 0):
            print(*(f"       {found}" for found in figure.places), sep="\n")
    return 0 if all(figure.is_kept for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
