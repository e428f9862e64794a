"""Messages of the APIs as messages of a prompt: text alone, and each role under one name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from fleet.errors import RequestFieldError
from fleet.http_api.request_fields import convert_fields, unsupported
from fleet.protocol.prompt import JsonObject
from fleet.utils.validation import JSON_ERRORS

ROLES: Final = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
TEXT_PARTS: Final = frozenset({"text", "input_text", "output_text"})
ONLY_TEXT: Final = "the model reads text alone"
REFUSED: Final = ("images", "image_url", "input_audio", "audio", "file", "function_call", "refusal")
KEPT: Final = ("name", "tool_call_id")


class ApiMessage(Struct, kw_only=True):
    """A message in a body. Fields that carry no text for the model are ignored.

    `content` is a text, or a list of parts of the type ``text``. `tool_name` is Ollama's `name` of
    a message with the role ``tool``.
    """

    role: str
    content: str | list[Any] | None = None
    name: str | None = None
    tool_calls: list[JsonObject] | None = None
    tool_call_id: str | None = None
    tool_name: str | None = None


def chat_messages(messages: Sequence[JsonObject], path: str = "messages") -> list[JsonObject]:
    """Return the messages of a body as messages of a prompt.

    Raises:
        RequestFieldError: a message has no role of a conversation, or more than text.
    """
    return [_chat_message(message, f"{path}[{i}]") for i, message in enumerate(messages)]


def _chat_message(fields: JsonObject, path: str) -> JsonObject:
    for name in REFUSED:
        if fields.get(name):
            raise unsupported(f"{path}.{name}", (), ONLY_TEXT)
    message = convert_fields(fields, ApiMessage, path)
    role = ROLES.get(message.role)
    if role is None:
        raise RequestFieldError(
            f"{path}.role",
            f"{path}.role: expected one of {', '.join(ROLES)}, got {message.role[:80]!r}",
        )
    turn: JsonObject = {"role": role, "content": _text(message.content, f"{path}.content")}
    if message.tool_calls:
        turn["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    named = {"name": message.name or message.tool_name, "tool_call_id": message.tool_call_id}
    return turn | {name: value for name, value in named.items() if value is not None}


def _tool_call(call: JsonObject) -> JsonObject:
    """Return a call with its arguments as an object, as chat templates read them."""
    function = call.get("function")
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(arguments, str):
        return call
    try:
        decoded = msgspec.json.decode(arguments)
    except JSON_ERRORS:
        return call
    return call | {"function": function | {"arguments": decoded}}


def _text(content: str | list[Any] | None, path: str) -> str | None:
    if not isinstance(content, list):
        return content
    return "\n".join(_part_text(part, f"{path}[{i}]") for i, part in enumerate(content))


def _part_text(part: Any, path: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise RequestFieldError(f"{path}.type", f"{path}.type: expected the text 'text'")
    if kind not in TEXT_PARTS:
        raise unsupported(f"{path}.{kind or 'type'}"[:200], (), ONLY_TEXT)
    text = part.get("text")
    if not isinstance(text, str):
        raise RequestFieldError(f"{path}.text", f"{path}.text: expected a text")
    return text
