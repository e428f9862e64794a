"""Build the documentation site into site/, without the network.

The pages are copied to build/docs in the layout of the checkout, so that their relative links lead
to the same place on a forge and in the site. An index of the decisions and the API reference are
added. The build fails on a broken link.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

ROOT: Final = Path(__file__).resolve().parent.parent
PAGES: Final = ROOT / "build" / "docs"
SITE: Final = ROOT / "site"
PACKAGES: Final = ("fleet", "edge_agent", "cloud_broker_worker", "onnx_export", "provisioning")
RELATIVE_LINK: Final = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def main() -> None:
    for old in (PAGES, SITE):
        shutil.rmtree(old, ignore_errors=True)
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        copy_page(page)
    write_decision_index()
    for room in rooms():
        write_reference_page(room)
    write_reference_index()
    program = str(Path(sys.executable).with_name("zensical"))
    if status := subprocess.call([program, "build", "--strict", "--clean"], cwd=ROOT):
        sys.exit(status)
    if broken := list(broken_links()):
        sys.exit("broken links in site/:\n" + "\n".join(broken))
    print(f"built {SITE / 'index.html'}")


def copy_page(page: Path) -> None:
    """Copy a page and the files that it links to; a directory is an index of its own."""
    for target in [
        page,
        *(page.parent / link for link in RELATIVE_LINK.findall(page.read_text(encoding="utf-8"))),
    ]:
        if target.is_file():
            copy = PAGES / target.resolve().relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target, copy)


def write_page(path: str, title: str, body: str) -> None:
    page = PAGES / path
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"# {title}\n\n{body}\n")


def write_decision_index() -> None:
    decisions = sorted((ROOT / "docs/adr").glob("[0-9]*.md"))
    titles = [
        (path.name, path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# "))
        for path in decisions
    ]
    lines = [f"- [{title}]({name})" for name, title in titles]
    write_page("docs/adr/README.md", "Decisions", "\n".join(lines))


def rooms() -> list[Path]:
    """The packages and their folders that hold code, but not the migrations."""
    found = {
        path.parent.relative_to(ROOT)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    return sorted(room for room in found if "migrations" not in room.parts)


def dotted(path: Path) -> str:
    return ".".join(path.with_suffix("").parts)


def write_reference_page(room: Path) -> None:
    """Write a page for the modules of a folder; the folders below it have pages of their own."""
    modules = [path.relative_to(ROOT) for path in sorted((ROOT / room).glob("*.py"))]
    names = [dotted(path) for path in modules if not path.stem.startswith("__")]
    content = "\n\n".join(f"::: {name}" for name in names)
    write_page(f"docs/reference/{dotted(room)}.md", dotted(room), content)


def write_reference_index() -> None:
    lines = [f"- [{dotted(room)}]({dotted(room)}.md)" for room in rooms()]
    write_page("docs/reference/README.md", "API reference", "\n".join(lines))


class Links(HTMLParser):
    """The links and the anchors of one HTML page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.anchors.update(value for name in ("id", "name") if (value := values.get(name)))
        if link := values.get("href" if tag == "a" else "src"):
            self.links.append(link)


def broken_links() -> Iterator[str]:
    """Yield the links of the built pages that lead to no file or no anchor of the site."""
    pages = {path: Links(path) for path in SITE.rglob("*.html") if path.name != "404.html"}
    for path, page in pages.items():
        for link in page.links:
            if not leads_somewhere(path, link, pages):
                yield f"{path.relative_to(SITE)}: {link}"


def leads_somewhere(path: Path, link: str, pages: dict[Path, Links]) -> bool:
    """Whether a link on the page at `path` leads outside, or to a file and an anchor that exist."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return True
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if target.is_dir():
        target /= "index.html"
    if not target.is_file():
        return False
    return not parts.fragment or unquote(parts.fragment) in pages[target].anchors


if __name__ == "__main__":
    main()
