"""Only fleet/protocol/topics.py builds, filters and parses topics."""

from __future__ import annotations

import re

from fleet.protocol.topics import PREFIX
from tests.architecture.sources import PACKAGES, modules, strings

LEVELS = re.compile(
    rf"{PREFIX}|\$share/|^/?(d|w|e|open)/|/\+(/|$)|/revoked"
    r"|/(status|stats|config|reported|prompt|reply|cancel)(/|$)|/s/"
)


def test_no_other_module_holds_a_piece_of_a_topic() -> None:
    found = [
        f"{path}:{line}: {text[:60]!r}"
        for path, tree in modules(*PACKAGES)
        if path != "fleet/protocol/topics.py"
        for line, text in strings(tree)
        if LEVELS.search(text)
    ]
    assert found == []
