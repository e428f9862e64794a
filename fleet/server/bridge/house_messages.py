"""The state and the answers of a device, as a house reads them: JSON with few fields."""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Struct

from fleet.errors import FleetError
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import Reply, Usage
from fleet.registry.results import StatsRow
from fleet.server.bridge.discovery import MAX_STATE_LENGTH

PERCENT: Final = 100.0
MS_PER_S: Final = 1000.0


class HouseState(Struct, frozen=True, kw_only=True):
    """The mode of a device, its offload rate in percent and its speed in the last hour."""

    mode: Mode | None = None
    offload_rate: float | None = None
    tokens_per_second: float | None = None


class HouseAnswer(Struct, frozen=True, kw_only=True):
    """An answer: `text` for a state of Home Assistant, which has at most 255 characters.

    `trigger` is the name of the trigger that asked; None for a prompt of the house.
    """

    text: str
    full_text: str = ""
    error: str | None = None
    trigger: str | None = None
    finish_reason: str | None = None
    usage: Usage | None = None


def house_state_of(mode: str, row: StatsRow | None) -> HouseState:
    """Return the state of a device with this mode and these statistics, if it has any answers."""
    known_mode = Mode(mode) if mode in set(Mode) else None
    if row is None or not row.generations:
        return HouseState(mode=known_mode)
    tpot_ms = row.tpot_p50_ms
    return HouseState(
        mode=known_mode,
        offload_rate=round(PERCENT * row.offload_rate, 1),
        tokens_per_second=round(MS_PER_S / tpot_ms, 1) if tpot_ms else None,
    )


def house_answer_of(trigger: str | None, answer: Reply | FleetError) -> HouseAnswer:
    """Return the message for the last reply of an answer, or for an error."""
    if isinstance(answer, FleetError):
        return _failed_answer(trigger, str(answer))
    if answer.error:
        return _failed_answer(trigger, answer.error.message)
    full_text = _text_of(answer)
    return HouseAnswer(
        text=_shortened(full_text),
        full_text=full_text,
        trigger=trigger,
        finish_reason=answer.finish_reason,
        usage=answer.usage,
    )


def encode_house_message(message: HouseState | HouseAnswer) -> bytes:
    """Return a message as JSON."""
    return msgspec.json.encode(message)


def _failed_answer(trigger: str | None, error: str) -> HouseAnswer:
    return HouseAnswer(text=_shortened(f"error: {error}"), error=error, trigger=trigger)


def _text_of(reply: Reply) -> str:
    if reply.choices:
        return reply.choices[0].full_text or ""
    return reply.full_text or reply.text


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_STATE_LENGTH else text[: MAX_STATE_LENGTH - 1] + "…"
