"""The walks through the code in docs/architecture.md are short, and lead where they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/architecture.md").read_text()
MAX_FILES = {"One prompt": 24, "One hidden state": 20, "One report": 21, "One device": 35}


@pytest.mark.parametrize("title", MAX_FILES)
def test_a_walk_passes_few_files_and_each_name_is_in_its_file(title: str) -> None:
    walk = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    files = set(re.findall(r"`([\w/]+\.py)`", walk))
    assert 0 < len(files) <= MAX_FILES[title]
    for name, dotted in re.findall(r"`([\w/]+\.py)`:\s+`([\w.]+)`", walk):
        source = (ROOT / name).read_text()
        for part in dotted.split("."):
            assert re.search(rf"\b(?:class|def) {part}\b", source), f"{dotted} is not in {name}"


def test_every_function_of_the_walks_exists() -> None:
    walks = PAGE.split("\n## One prompt\n")[1]
    sources = "\n".join(path.read_text() for path in ROOT.glob("[!.]*/**/*.py"))
    for dotted in set(re.findall(r"`([A-Z]\w+\.\w+)`", walks)):
        assert re.search(rf"\bdef {dotted.split('.')[1]}\b", sources), dotted
