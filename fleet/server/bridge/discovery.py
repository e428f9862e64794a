"""The description of a device for Home Assistant: one message for a device and its entities.

The fields are those of Home Assistant's MQTT integration, section "Device discovery payload".
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

import msgspec

from fleet.protocol.modes import Mode
from fleet.server.bridge import house_topics
from fleet.server.bridge.house_topics import BASE
from fleet.version import __version__

ONLINE: Final = b"online"
OFFLINE: Final = b"offline"
MAX_STATE_LENGTH: Final = 255  # characters of a state in Home Assistant
NAME: Final = "CE-CoLLM Fleet"


@lru_cache(maxsize=1024)
def discovery_message(app: str, device: str) -> bytes:
    """Return the description of `device` as the bridge `app` publishes it, in JSON."""
    availability = (
        house_topics.bridge_availability(app),
        house_topics.house_availability(app, device),
    )
    message = {
        "dev": {"ids": [f"{BASE}-{app}-{device}"], "name": device, "mf": NAME},
        "o": {"name": NAME, "sw": __version__},
        "availability": [{"topic": topic} for topic in availability],
        "availability_mode": "all",
        "cmps": {
            key: entity | {"qos": 1, "unique_id": f"{BASE}-{app}-{device}-{key}"}
            for key, entity in _entities(app, device).items()
        },
    }
    return msgspec.json.encode(message)


def _entities(app: str, device: str) -> dict[str, dict[str, Any]]:
    return {
        "prompt": _prompt(app, device),
        "answer": _answer(app, device),
        "mode": _mode(app, device),
        "offload_rate": _measurement(app, device, "Offload rate", "offload_rate", "%"),
        "speed": _measurement(app, device, "Speed", "tokens_per_second", "tokens/s"),
    }


def _prompt(app: str, device: str) -> dict[str, Any]:
    return {
        "p": "notify",
        "name": "Prompt",
        "command_topic": house_topics.house_prompt(app, device),
    }


def _answer(app: str, device: str) -> dict[str, Any]:
    topic = house_topics.house_answer(app, device)
    return {
        "p": "sensor",
        "name": "Last answer",
        "state_topic": topic,
        "value_template": "{{ value_json.text }}",
        "json_attributes_topic": topic,
        "force_update": True,
    }


def _mode(app: str, device: str) -> dict[str, Any]:
    return {
        "p": "select",
        "name": "Mode",
        "options": list(Mode),
        "state_topic": house_topics.house_state(app, device),
        "value_template": "{{ value_json.mode }}",
        "command_topic": house_topics.house_mode(app, device),
        "entity_category": "config",
    }


def _measurement(app: str, device: str, name: str, field: str, unit: str) -> dict[str, Any]:
    return {
        "p": "sensor",
        "name": name,
        "state_topic": house_topics.house_state(app, device),
        "value_template": f"{{{{ value_json.{field} }}}}",
        "unit_of_measurement": unit,
        "state_class": "measurement",
    }
