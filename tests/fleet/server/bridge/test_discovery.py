"""The description of a device against the fields that Home Assistant's documentation gives."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest

from fleet.protocol.modes import Mode
from fleet.server.bridge.discovery import discovery_message


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# home-assistant.io: /integrations/mqtt/#device-discovery-payload, and the page of each platform.
# The first two lists are of the abbreviations inside of "dev" and "o".
DEVICE_FIELDS: Final = words("ids cns cu hw mf mdl mdl_id name sa sn sw via_device")
ORIGIN_FIELDS: Final = words("name sw url")
ROOT_FIELDS: Final = words(
    "dev o cmps availability availability_mode availability_topic availability_template "
    "payload_available payload_not_available state_topic command_topic qos encoding"
)
ENTITY_FIELDS: Final = words(
    "p name unique_id qos encoding icon entity_category enabled_by_default default_entity_id "
    "json_attributes_topic json_attributes_template"
)
FIELDS: Final = {
    "notify": ENTITY_FIELDS | words("command_topic command_template retain"),
    "select": ENTITY_FIELDS
    | words("command_topic command_template options optimistic retain state_topic value_template"),
    "sensor": ENTITY_FIELDS
    | words(
        "state_topic value_template device_class expire_after force_update options state_class "
        "suggested_display_precision unit_of_measurement"
    ),
}
REQUIRED: Final = {
    "notify": words("command_topic"),
    "select": words("command_topic options"),
    "sensor": words("state_topic"),
}


@pytest.fixture(scope="module")
def message() -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(discovery_message("house", "kitchen"))
    return fields


def test_the_message_has_the_required_fields_and_no_other(message: dict[str, Any]) -> None:
    assert message.keys() <= ROOT_FIELDS
    assert message.keys() >= {"dev", "o", "cmps"}
    assert message["dev"].keys() <= DEVICE_FIELDS
    assert message["dev"]["ids"] == ["ce-collm-house-kitchen"]
    assert message["o"].keys() <= ORIGIN_FIELDS
    assert message["o"]["name"]


def test_each_entity_has_the_fields_of_its_platform(message: dict[str, Any]) -> None:
    for entity in message["cmps"].values():
        platform = entity["p"]
        assert entity.keys() <= FIELDS[platform]
        assert entity.keys() >= REQUIRED[platform] | {"unique_id", "name"}
    platforms = [entity["p"] for entity in message["cmps"].values()]
    assert sorted(platforms) == ["notify", "select", "sensor", "sensor", "sensor"]


def test_entities_of_two_devices_and_bridges_have_different_ids() -> None:
    pairs = [("house", "kitchen"), ("house", "attic"), ("garden", "kitchen")]
    messages = [json.loads(discovery_message(*pair)) for pair in pairs]
    ids = [entity["unique_id"] for each in messages for entity in each["cmps"].values()]
    assert len(set(ids)) == len(ids) == 15


def test_a_device_is_available_when_it_and_its_bridge_are(message: dict[str, Any]) -> None:
    assert message["availability_mode"] == "all"
    topics = [each["topic"] for each in message["availability"]]
    assert topics == ["ce-collm/house/availability", "ce-collm/house/kitchen/availability"]


def test_the_select_has_all_modes(message: dict[str, Any]) -> None:
    assert message["cmps"]["mode"]["options"] == list(Mode)
