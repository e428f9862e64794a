"""The line of counts under an answer, and the options of its request."""

from __future__ import annotations

import pytest

from fleet.cli.options import make_request
from fleet.cli.views import usage_line
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import ChatMessage, Usage
from fleet.protocol.report import Switch

ALONE = Switch(0, Mode.STANDALONE, "the link is down")
BACK = Switch(9, Mode.COLLABORATIVE, "the link is back")
FIRST = "from token 0 on standalone: the link is down"


def make_usage(**changes: object) -> Usage:
    """Return the usage of one token."""
    values: dict[str, object] = {
        "prompt_tokens": 1,
        "tokens": 1,
        "sources": {},
        "offload_rate": 0.0,
        "bytes_up": 0,
        "bytes_down": 0,
        "ttft_ms": 1.0,
        "tpot_ms": 1.0,
    }
    return Usage(**values | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mode", "switches", "expected"),
    [
        (Mode.AUTO, (), ["auto began as collaborative]"]),
        (Mode.AUTO, (ALONE, BACK), [FIRST, "from token 9 on collaborative: the link is back]"]),
        (Mode.AUTO, (BACK,), ["auto began as collaborative", "from token 9 on"]),
        (Mode.VERIFIED, (), ["then 1 ms a token]"]),
    ],
)
def test_the_line_has_the_mode_that_auto_chose(
    mode: Mode, switches: tuple[Switch, ...], expected: list[str]
) -> None:
    words = usage_line(make_usage(mode=mode, switches=switches), None).plain.split("; ")[
        -len(expected) :
    ]
    for word, start in zip(words, expected, strict=True):
        assert start in word


def test_top_k_is_an_option_of_a_request() -> None:
    request = make_request(
        (ChatMessage("user", "hi"),),
        mode=None,
        threshold=None,
        max_new_tokens=None,
        temperature=0.7,
        top_p=1.0,
        top_k=40,
        seed=None,
    )
    assert request.sampling.top_k == 40
