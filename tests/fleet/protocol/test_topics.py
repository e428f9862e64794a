"""Topic names: built and parsed."""

import pytest

from fleet.errors import TopicError
from fleet.protocol import topics

BUILT = [
    (topics.device_status("pi"), "ce/v1/d/pi/status"),
    (topics.device_stats("pi"), "ce/v1/d/pi/stats"),
    (topics.device_prompt("pi", "app", "r1"), "ce/v1/d/pi/prompt/app/r1"),
    (topics.device_reply("pi", "app", "r1"), "ce/v1/d/pi/reply/app/r1"),
    (topics.device_cancel("pi", "app", "r1"), "ce/v1/d/pi/cancel/app/r1"),
    (topics.to_device("pi", "s1"), "ce/v1/d/pi/s/s1"),
    (topics.to_worker("w1", "pi", "s1"), "ce/v1/w/w1/pi/s1"),
    (topics.open_session("pi"), "ce/v1/open/pi"),
    (topics.worker_status("w1"), "ce/v1/w/w1/status"),
]
MATCHES = [
    ("ce/v1/d/+/status", "ce/v1/d/pi/status", True),
    ("ce/v1/d/+/status", "ce/v1/d/pi/stats", False),
    ("ce/v1/d/+/status", "ce/v1/d/pi/x/status", False),
    ("ce/v1/d/+", "ce/v1/d/pi/status", False),
    ("ce/v1/d/pi/status", "ce/v1/d/pi", False),
    ("ce/v1/#", "ce/v1/d/pi/status", True),
    ("ce/v1/#", "ce/v1", True),
    ("ce/v1/d/+/s/+", "ce/v1/d/pi/s/", True),
    ("#", "ce/v1/d/pi", True),
]


@pytest.mark.parametrize(("built", "expected"), BUILT)
def test_a_topic_is_built_as_the_protocol_states(built: str, expected: str) -> None:
    assert built == expected


@pytest.mark.parametrize(("built", "expected"), BUILT)
def test_every_topic_stays_within_the_limits_of_brokers(built: str, expected: str) -> None:
    longest = "a" * 63
    for name in ("pi", "app", "r1", "s1", "w1"):
        expected = "/".join(longest if level == name else level for level in expected.split("/"))
    assert built.count("/") <= 7
    assert len(expected.encode()) <= 256


def test_parsing_gives_the_names_in_their_order() -> None:
    assert topics.parse_topic("ce/v1/d/pi/prompt/app/r1", topics.PROMPT_FILTER) == (
        "pi",
        "app",
        "r1",
    )


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "ce/v1",
        "ce/v2/d/pi/status",
        "ce/v1/d/pi/stats",
        "ce/v1/d/pi/status/x",
        "ce/v1/d//status",
        "ce/v1/d/+/status",
        "ce/v1/d/PI/status",
        "/ce/v1/d/pi/status",
        "ce/v1/d/" + "a" * 64 + "/status",
    ],
)
def test_a_topic_of_another_shape_is_refused(topic: str) -> None:
    with pytest.raises(TopicError):
        topics.parse_topic(topic, topics.DEVICE_STATUS_FILTER)


@pytest.mark.parametrize("name", ["a", "0", "pi-1", "room_2", "a" * 63])
def test_a_plain_name_may_stand_in_a_topic(name: str) -> None:
    assert topics.check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "-a", "_a", "A", "a b", "a/b", "+", "#", "$share", "ä", "a\n", "a\0", "..", "a" * 64],
)
def test_any_other_name_is_refused_with_one_line_that_states_the_rule(name: str) -> None:
    with pytest.raises(TopicError, match="expected 1 to 63 characters") as caught:
        topics.check_name(name, "device")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("topic_filter", "topic", "expected"), MATCHES)
def test_a_filter_covers_the_topics_of_the_mqtt_rules(
    topic_filter: str, topic: str, expected: bool
) -> None:
    assert topics.matches(topic_filter, topic) is expected
