"""Values as a page shows them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final

from markupsafe import Markup, escape

from fleet.protocol.modes import CLOUD, FALLBACK, LOOKUP
from fleet.utils.printable import printable_line

MAX_CHARS: Final = 400
MAX_DETAIL_CHARS: Final = 80
STEPS_S: Final = ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min"), (1.0, "s"))
SOURCE_CLASSES: Final = {LOOKUP: "lookup", CLOUD: "cloud", FALLBACK: "fallback"}
NUM_EXIT_CLASSES: Final = 4


def shortened(text: object, max_chars: int = MAX_CHARS) -> str:
    """Return one line of a text from outside, without control characters and not too long."""
    line = printable_line(text)
    return line if len(line) <= max_chars else line[: max_chars - 1] + "…"


def percent(share: float | None) -> str:
    """Return a share as a percentage."""
    return "-" if share is None else f"{share:.1%}"


def number(value: float | None) -> str:
    """Return a number with thousands separators; a dash for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}"


def milliseconds(value: float | None) -> str:
    """Return a time in ms or s."""
    if value is None:
        return "-"
    return f"{value:,.0f} ms" if value < 10_000 else f"{value / 1e3:,.1f} s"


def num_bytes(value: float | None) -> str:
    """Return a number of bytes with its unit."""
    if value is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"


def moment(at: float | None) -> Markup:
    """Return a time in seconds since 1970 as an element of HTML, to the second in UTC."""
    if at is None:
        return Markup("never")
    try:
        time = datetime.fromtimestamp(at, UTC)
    except (ValueError, OverflowError, OSError):  # a device's clock may be anything
        return escape(f"{at:g} s")
    text = time.strftime("%Y-%m-%d %H:%M:%S")
    return Markup('<time datetime="{}Z">{}</time>').format(text.replace(" ", "T"), text)


def audit_detail(value: object, key: str) -> str | Markup:
    """Return a value of the audit log: a time as a time, and others as text or JSON."""
    if key.endswith("_at") and isinstance(value, int | float):
        return moment(value)
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return shortened(", ".join(value), MAX_DETAIL_CHARS)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return shortened(text, MAX_DETAIL_CHARS)


def age(at: float | None, now: float) -> str:
    """Return how long ago a time was."""
    if at is None:
        return "never"
    if not math.isfinite(at) or at > now:
        return "now"
    for step_s, unit in STEPS_S:
        if now - at >= step_s:
            return f"{int((now - at) / step_s)} {unit} ago"
    return "now"


def exits_in_order(sources: Iterable[str]) -> list[str]:
    """Return the exits among sources, by depth."""
    exits = {source for source in sources if source not in SOURCE_CLASSES}
    return sorted(exits, key=lambda source: (_depth(source), source))


def _depth(source: str) -> int:
    layer = source.rpartition(":")[2]
    return int(layer) if layer.isdecimal() and len(layer) < 6 else 0


def source_class(source: str, exits: list[str]) -> str:
    """Return the class of style of a source; `exits` are in order of depth."""
    if source in SOURCE_CLASSES:
        return SOURCE_CLASSES[source]
    place = exits.index(source) if source in exits else 0
    return f"exit{place % NUM_EXIT_CLASSES}"
