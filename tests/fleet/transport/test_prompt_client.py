"""The time that an app waits for a reply."""

import pytest

from fleet.protocol.prompt import PromptRequest
from fleet.transport.prompt_client import REPLY_TIMEOUT_S, reply_timeout_s


@pytest.mark.parametrize(
    ("request_", "answer_s"),
    [
        (PromptRequest(prompt="hi", deadline_ms=5000), 0.0),
        (PromptRequest(prompt="hi", deadline_ms=5000, stream=False), 5.0),
        (PromptRequest(prompt="hi", stream=False), 600.0),
    ],
)
def test_an_answer_in_one_reply_may_take_as_long_as_the_answer(
    request_: PromptRequest, answer_s: float
) -> None:
    assert reply_timeout_s(request_) == REPLY_TIMEOUT_S + answer_s
