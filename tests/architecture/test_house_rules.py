"""The rules on form and language that `scripts/measure_code.py` measures."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]
RULES = runpy.run_path(str(ROOT / "scripts/measure_code.py"), run_name="measure_code")


def test_every_figure_is_within_its_limit() -> None:
    sources = [RULES["Source"](path, path.read_text()) for path in RULES["tracked"]("*.py")]
    figures = RULES["measure"](sources)
    assert figures
    assert [figure for figure in figures if not figure.is_kept] == []


def test_the_rules_see_what_they_forbid(tmp_path: Path) -> None:
    body = "def double(a, b):\n    a, b = b, a\n    f(1, 2, 3, 4, 5, 6)\n"
    text = '"""Where it goes wrong."""\n' + body
    source = RULES["Source"](ROOT / "example.py", text)
    assert len(list(RULES["openings"]([source]))) == 1
    assert len(list(RULES["tuple_assignments"]([source]))) == 1
    assert len(list(RULES["calls_by_position"]([source]))) == 1
    assert len(list(RULES["repeated_names"]([source, source]))) == 2
    graph = {"p.a": {"p.b"}, "p.b": {"p.c"}, "p.c": {"p.a"}, "p.d": {"p.a"}, "q": set()}
    assert len(list(RULES["cycles"](graph))) == 3
