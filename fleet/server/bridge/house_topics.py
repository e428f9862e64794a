"""The topics at a house's broker. The fleet's own topics are in `fleet.protocol.topics`."""

from __future__ import annotations

from typing import Final

from fleet.protocol.topics import ANY, PREFIX

BASE: Final = "ce-collm"
DISCOVERY: Final = "homeassistant"  # the prefix that Home Assistant reads by default

NEVER_EVENTS: Final = (f"{BASE}/", f"{DISCOVERY}/", f"{PREFIX}/", "$")
"""Beginnings of topics that never become events: those of bridges, of Home
Assistant's discovery, of the fleet and of the broker.

An event from one of them could come back to the bridge that published it.
"""


def bridge_availability(app: str) -> str:
    """The topic of ``online`` or ``offline`` for a bridge; ``offline`` is its last will."""
    return f"{BASE}/{app}/availability"


def house_availability(app: str, device: str) -> str:
    """The topic of ``online`` or ``offline`` for a device."""
    return f"{BASE}/{app}/{device}/availability"


def house_state(app: str, device: str) -> str:
    """The topic of a device's mode, offload rate and speed."""
    return f"{BASE}/{app}/{device}/state"


def house_answer(app: str, device: str) -> str:
    """The topic of a device's answers."""
    return f"{BASE}/{app}/{device}/answer"


def house_prompt(app: str, device: str = ANY) -> str:
    """The topic of prompts to a device, or their filter."""
    return f"{BASE}/{app}/{device}/prompt"


def house_mode(app: str, device: str = ANY) -> str:
    """The topic of the modes that are chosen for a device, or their filter."""
    return f"{BASE}/{app}/{device}/mode/set"


def house_discovery(app: str, device: str = ANY) -> str:
    """The topic of a device's description for Home Assistant, or the filter for all devices."""
    return f"{DISCOVERY}/device/{BASE}-{app}/{device}/config"
