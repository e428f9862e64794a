"""Only fleet/protocol/topics.py builds, filters and parses topics of the fleet."""

from __future__ import annotations

import re

from fleet.protocol.topics import PREFIX
from tests.architecture.sources import PACKAGES, modules, strings

OWNERS = (
    "fleet/protocol/topics.py",
    "fleet/server/bridge/house_topics.py",  # topics at another broker, that of a house
)
LEVELS = re.compile(
    rf"{PREFIX}|\$share/|^/?(d|w|e|open)/|/\+(/|$)|/revoked"
    r"|/(status|stats|config|reported|prompt|reply|cancel)(/|$)|/s/"
)


def test_no_other_module_holds_a_piece_of_a_topic() -> None:
    found = [
        f"{path}:{line}: {text[:60]!r}"
        for path, tree in modules(*PACKAGES)
        if path not in OWNERS
        for line, text in strings(tree)
        if LEVELS.search(text)
    ]
    assert found == []
