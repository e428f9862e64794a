"""The operation whose response is a stream: an operator's prompt to a device."""

from __future__ import annotations

from typing import Any, Final

from fleet.operator_api.operation import Operation, OperatorRole
from fleet.protocol.prompt import PromptRequest, Reply

REPLY: Final = "reply"
PROBLEM: Final = "problem"
"""The events of the stream: a reply, or the error that ends the answer."""

PROMPT_DEVICE: Final[Operation[Any, Any]] = Operation(
    method="POST",
    path="/devices/{device}/prompts",
    role=OperatorRole.OPERATOR,
    request=PromptRequest,
    response=Reply,
    summary="Prompt a device and stream its answer, by default with its trace",
)
"""It is not in the catalogue, because its response is a stream."""
