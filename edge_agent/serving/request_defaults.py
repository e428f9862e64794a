"""The fields that a request leaves out, filled in from the settings of the device."""

from __future__ import annotations

import secrets
from typing import Any, Final

from msgspec.structs import replace

from edge_agent.config import AgentConfig
from fleet.protocol.prompt import ChatMessage, PromptRequest, SamplingOptions

SEED_BITS: Final = 53  # the size of a random seed; every reader of JSON keeps 53 bits exactly


def with_defaults(request: PromptRequest, config: AgentConfig) -> PromptRequest:
    """Return a request with a seed, all options of sampling, and a system message.

    A field that the request has stays as it is, and so does a system message. A raw prompt gets
    none.
    """
    changes: dict[str, Any] = {
        name: getattr(config, name)
        for name in SamplingOptions.__struct_fields__
        if getattr(request, name) is None
    }
    if request.seed is None:
        changes["seed"] = secrets.randbits(SEED_BITS)
    if config.system_prompt and not request.raw and not _has_system_message(request):
        system = ChatMessage("system", config.system_prompt)
        changes |= {"prompt": None, "messages": (system, *request.chat)}
    return replace(request, **changes)


def _has_system_message(request: PromptRequest) -> bool:
    return any(message.role == "system" for message in request.chat)
