"""The operator's map of a house's topics to channels of events."""

from __future__ import annotations

import pytest

from fleet.errors import ConfigError, TopicError
from fleet.server.bridge.mapped_topics import MAX_MAPPINGS, TopicMap


@pytest.mark.parametrize(
    ("maps", "topic", "channel"),
    [
        (["zigbee2mqtt/hall=hall"], "zigbee2mqtt/hall", "hall"),
        (["zigbee2mqtt/hall=hall"], "zigbee2mqtt/hall/set", None),
        (["zigbee2mqtt/hall=hall", "zigbee2mqtt/+=any"], "zigbee2mqtt/hall", "hall"),
        (["zigbee2mqtt/+"], "zigbee2mqtt/Living room", "zigbee2mqtt-living-room"),
        (["a=b=c"], "a=b", "c"),
        (["home/#"], "home/" + "x" * 100, ("home-" + "x" * 100)[:63]),
        (["#"], "homeassistant/sensor/1/state", None),
        (["#"], "ce-collm/house/kitchen/prompt", None),
        (["#"], "ce/v1/d/kitchen/config", None),
        (["+/v1/#"], "ce/v1/e/house/hall", None),
        (["#"], "$SYS/broker/uptime", None),
        ([], "zigbee2mqtt/hall", None),
    ],
)
def test_a_topic_has_the_channel_of_the_first_mapping(
    maps: list[str], topic: str, channel: str | None
) -> None:
    assert TopicMap.parse(maps).channel_of(topic) == channel


@pytest.mark.parametrize(
    "text",
    [
        "",
        "=hall",
        "a=Hall",
        "a=",
        "a/#/b=x",
        "a+=x",
        "a\0b",
        "ce-collm/#",
        "ce/v1/e/+/+",
        "$SYS/#",
        "homeassistant/+/config",
        "x" * 1001,
    ],
)
def test_a_mapping_that_cannot_work_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--map"):
        TopicMap.parse([text])


def test_a_topic_without_a_name_in_it_has_no_channel() -> None:
    with pytest.raises(TopicError, match="channel"):
        TopicMap.parse(["#"]).channel_of("///")


def test_the_number_of_mappings_is_bounded() -> None:
    with pytest.raises(ConfigError, match="at most 64 times --map"):
        TopicMap.parse(["a"] * (MAX_MAPPINGS + 1))


def test_a_mapping_is_printed_as_it_was_given() -> None:
    maps = ["zigbee2mqtt/hall=hall", "home/#"]
    assert [str(each) for each in TopicMap.parse(maps).mappings] == maps
