"""A page of HTML, parsed, and checks that hold for every page."""

from __future__ import annotations

from collections import Counter
from html.parser import HTMLParser

VOID = {"meta", "link", "input", "br", "rect", "circle", "polyline", "path"}
CONTROLS = {"input", "select", "textarea"}


class HtmlPage(HTMLParser):
    """The parts of a page that the checks look at. `texts` are those of its body."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = source
        self.problems: list[str] = []
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.texts: list[str] = []
        self._ids: Counter[str] = Counter()
        self._open: list[str] = []
        self.feed(source)
        self.close()
        self.problems += [f"{tag} is not closed" for tag in self._open]
        self.problems += [f"the id {name} is not unique" for name, n in self._ids.items() if n > 1]
        if self.tags["h1"] != 1 or self.tags["main"] != 1:
            self.problems.append("expected one h1 and one main")

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags[tag] += 1
        self._check(tag, values)
        if identifier := values.get("id"):
            self._ids[identifier] += 1
        if tag == "a":
            self.links.append(values.get("href") or "")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self._check(tag, dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.problems.append(f"</{tag}> closes another element")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def _check(self, tag: str, values: dict[str, str | None]) -> None:
        if "style" in values or any(name.startswith("on") for name in values):
            self.problems.append(f"{tag} has a style or a script")
        if tag == "script" and not (values.get("src") or "").startswith("/static/"):
            self.problems.append("a script stands in the page")
        if tag == "style":
            self.problems.append("a style stands in the page")
        is_hidden = values.get("type") == "hidden"
        if tag in CONTROLS and not is_hidden and "label" not in self._open:
            self.problems.append(f"{tag} {values.get('name')} has no label")
        if tag == "th" and values.get("scope") not in ("col", "row"):
            self.problems.append("a header of a table has no scope")
